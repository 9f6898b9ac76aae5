"""Text encoders of families: prompts beyond the limit, and parts of another pipeline."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from latentreward.alignment import PolicySource
from latentreward.core.errors import InputError
from tests.diffusion.families.twins import PROMPTS, TWINS, Twin
from tests.tiny_pipelines import source_of

TOLD = [twin for twin in TWINS.values() if twin.family != "sd3"]


ENCODERS: dict[str, tuple[PolicySource, dict[str, bool]]] = {
    **{name: (twin.source(), {}) for name, twin in TWINS.items()},
    "without T5": (TWINS["sd35_large"].source(), {"load_t5": False}),
    **{name: (PolicySource(source_of(name)), {}) for name in ("sd15", "sdxl")},
}


@pytest.mark.parametrize(("source", "options"), ENCODERS.values(), ids=ENCODERS.keys())
def test_a_prompt_beyond_the_limit_is_told_once(source: Any, options: Any, caplog: pytest.LogCaptureFixture) -> None:
    encoder = source.resolve_family().load_prompt_encoder(**options)
    with caplog.at_level(logging.WARNING, logger="latentreward"):
        encoder.tokenize(["a cat"])
        assert "are read" not in caplog.text
        for _ in range(2):
            encoder.tokenize(["a cat", "two dogs on a hill " * 600])
    read = encoder.num_tokens + getattr(encoder, "dropped_tokens", 0)
    read = encoder.clip_length if options else getattr(encoder, "t5_length", read)
    assert caplog.text.count(f"of which {read} are read") == 1


LAYERS = {"z_image": 2, "lumina2": 2, "ernie_image": 2, "krea2": 3, "ideogram4": 36, "klein_base": 27}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_the_text_encoder_that_are_not_read_are_not_kept(name: str) -> None:
    encoder = TWINS[name].source().resolve_family().load_prompt_encoder()
    model = getattr(encoder.text_encoder, "model", encoder.text_encoder)
    assert len(model.layers) == LAYERS[name] and isinstance(model.norm, nn.Identity)
    encoder(PROMPTS).prompt_embeds.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


WIDTHS = ("joint_attention_dim", "cap_feat_dim", "text_dim", "text_in_dim", "text_hidden_dim", "pooled_projection_dim")
WIDTHS += ("text_emb_dim", "llm_features_dim")


@pytest.mark.parametrize(("twin", "number"), [*((twin, 0) for twin in TOLD), (TWINS["flux1_dev"], 1)])
def test_a_text_encoder_of_another_width_is_refused(twin: Twin, number: int, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(twin.folder, tmp_path / "pipeline"))
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    field = [name for name in WIDTHS if name in config][number]
    path.write_text(json.dumps(config | {field: config[field] + 1}))
    with pytest.raises(InputError, match=r"wide, but the transformer takes (\d+); all parts must") as refused:
        PolicySource(str(folder)).resolve_family().load_prompt_encoder()
    taken = re.search(r"takes (\d+)", str(refused.value))
    assert taken and int(taken[1]) % (config[field] + 1) == 0  # of several layers of the text encoder
