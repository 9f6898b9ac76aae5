"""Facts of Krea 2 that the tests of all families cannot see."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

from latentreward.core.errors import InputError
from latentreward.diffusion.families.krea2 import LAYERS
from tests.diffusion.families.twins import PROMPTS, TWINS

TWIN = TWINS["krea2"]
LONG = "two dogs on a hill " * 300


@pytest.fixture(scope="module")
def encoded() -> tuple[Any, Any, Any, Any]:
    """The pipeline's states and mask, which have padding before the end of the template, and ours."""
    encoder, pipeline = TWIN.source().resolve_family().load_prompt_encoder(), TWIN.pipeline()
    # The pipeline drops as many tokens as Qwen's own tokenizer makes of the template.
    pipeline.prompt_template_encode_start_idx = encoder.dropped_tokens
    end = pipeline.tokenizer(pipeline.prompt_template_encode_suffix).input_ids
    pipeline.prompt_template_encode_num_suffix_tokens = len(end)
    prompts = [*PROMPTS, "", LONG]
    with torch.no_grad():
        return (*pipeline.encode_prompt(prompts, torch.device("cpu")), encoder(prompts), encoder)


def test_prompts_are_encoded_as_by_the_pipeline_with_the_end_of_the_template_also_after_a_cut(encoded: Any) -> None:
    want, mask, found, encoder = encoded
    assert found.prompt_mask.sum(dim=1).tolist() == mask.sum(dim=1).tolist()
    assert found.prompt_mask[-1].sum() == encoder.num_tokens == 512
    for row in range(len(mask)):
        ours = found.prompt_embeds[row][found.prompt_mask[row]]
        torch.testing.assert_close(ours, want[row][mask[row]].flatten(1), rtol=0, atol=1e-5)


def test_layers_are_those_of_the_published_model_where_none_are_named(tmp_path: Path) -> None:
    copytree(TWIN.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "text_encoder_select_layers": None}))
    family = TWIN.source(source=str(tmp_path / "copy")).resolve_family()
    assert family.layers == LAYERS and len(LAYERS) == 12
    with pytest.raises(InputError, match="of a text encoder is read, but this one has 4"):
        family.load_prompt_encoder()
