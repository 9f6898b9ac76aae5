"""Text encoders of families: prompts beyond the limit, and parts of another pipeline."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest

from latentreward.alignment import PolicySource
from latentreward.core.errors import InputError
from tests.diffusion.families.twins import PROMPTS, TWINS, Twin
from tests.tiny_pipelines import source_of

TOLD = [twin for twin in TWINS.values() if twin.family != "sd3"]


@pytest.mark.parametrize("twin", TWINS.values(), ids=lambda twin: twin.name)
def test_a_prompt_beyond_the_limit_is_told_once(twin: Twin, caplog: pytest.LogCaptureFixture) -> None:
    encoder = twin.source().resolve_family().load_prompt_encoder()
    with caplog.at_level(logging.WARNING, logger="latentreward"):
        encoder.tokenize(PROMPTS)
        assert "are read" not in caplog.text
        for _ in range(2):
            encoder.tokenize(["a cat", "two dogs on a hill " * 600])
    read = getattr(encoder, "t5_length", encoder.num_tokens + encoder.dropped_tokens)
    assert caplog.text.count(f"of which {read} are read") == 1


def test_without_t5_it_is_told_of_clip(caplog: pytest.LogCaptureFixture) -> None:
    encoder = TWINS["sd35_large"].source().resolve_family().load_prompt_encoder(load_t5=False)
    with caplog.at_level(logging.WARNING, logger="latentreward"):
        encoder.tokenize(PROMPTS[:1])
        assert "are read" not in caplog.text
        encoder.tokenize(["two dogs on a hill " * 600])
    assert f"of which {encoder.clip_length} are read" in caplog.text


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_so_it_is_by_the_clip_of_a_unet(name: str, caplog: pytest.LogCaptureFixture) -> None:
    encoder = PolicySource(source_of(name)).resolve_family().load_prompt_encoder()
    with caplog.at_level(logging.WARNING, logger="latentreward"):
        encoder.tokenize(["a cat"])
        assert "are read" not in caplog.text
        for _ in range(2):
            encoder.tokenize(["a cat", "two dogs on a hill " * 600])
    assert caplog.text.count(f"of which {encoder.num_tokens} are read") == 1


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
