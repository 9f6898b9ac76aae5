"""Configs with missing and wrong values are refused in one line that names part, field and value."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from shutil import copytree
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from latentreward.apps.estimate.pipelines import PUBLISHED as ALL
from latentreward.core.errors import InputError
from latentreward.diffusion import FlowFamily, find_family
from latentreward.diffusion.backbones.loading import PipelineSource
from latentreward.diffusion.families.base import families
from tests.diffusion.families.made_configs import MadeConfigs
from tests.diffusion.families.twins import TWINS
from tests.tiny_pipelines import pipeline_folder

FLOWS = {name: kind for name, kind in families().items() if issubclass(kind, FlowFamily) and name != "hidream"}
"""Families of which the package has a published config."""
SCALED, CHANNELS, DYNAMIC = ("flux1", "lumina2", "z_image"), ("qwen_image", "wan21"), ("flux1", "qwen_image")
EULERS = [name for name in FLOWS if name != "wan21"]
ABSENT = object()
PUBLISHED = {
    name: [one for one in ALL.values() if kind.recognises(MadeConfigs(one["parts"], **one.get("index", {})))]
    for name, kind in FLOWS.items()
}


class Normed(MadeConfigs):
    """Configs of a pipeline whose VAE has statistics."""

    def tensors(self, part: str, names: Sequence[str]) -> list[Tensor]:
        return [torch.ones(128) for _ in names]


def used(name: str, part: str = "", field: str = "", value: Any = None, number: int = 0) -> list[float]:
    """Levels of a published pipeline of which one entry is another; what else is read of configs is read before."""
    published = PUBLISHED[name][number]
    parts = {key: dict(config) for key, config in published["parts"].items()}
    index = dict(published.get("index", {}))
    if part:
        (index if part == "index" else parts[part])[field] = value
        if value is ABSENT:
            del parts[part][field]
    family = FLOWS[name](Normed(parts, **index))
    family.check()
    assert family.model and family.width and family.guidance(None) is not ABSENT
    return family.levels(4, family.latent_shape())[1].tolist()


WRONG = [
    *((name, "transformer", "in_channels", value) for name in FLOWS for value in (ABSENT, None, "16", 17, 16.0)),
    *((name, "vae", "scaling_factor", value) for name in SCALED for value in (ABSENT, "x", 0, math.nan, math.inf)),
    *((name, "vae", "latent_channels", value) for name in (*SCALED, "flux2_klein") for value in (ABSENT, "x", 0)),
    *((name, "vae", "block_out_channels", value) for name in (*SCALED, "flux2_klein") for value in (ABSENT, 4, [])),
    *((name, "vae", "shift_factor", "x") for name in SCALED),
    *((name, "vae", "latents_mean", value) for name in CHANNELS for value in (["a"] * 16, 3, [0.0] * 4)),
    *((name, "vae", "latents_std", value) for name in CHANNELS for value in ([0.0] * 16, [math.nan] * 16, ABSENT)),
    *((name, "vae", "temperal_downsample", value) for name in CHANNELS for value in (3, ["a"], ABSENT)),
    *((name, "vae", "z_dim", "16") for name in CHANNELS),
    ("flux2_klein", "vae", "batch_norm_eps", "x"),
    ("flux2_klein", "index", "is_distilled", "false"),
    *((name, "scheduler", "_class_name", "DDIMScheduler") for name in FLOWS),
    *((name, "scheduler", "shift", value) for name in ("z_image", "lumina2") for value in ("x", 0, -2.0, math.nan)),
    *(("wan21", "scheduler", "flow_shift", value) for value in ("x", 0, -2.0)),
    *((name, "scheduler", field, True) for name in EULERS for field in ("invert_sigmas", "stochastic_sampling")),
    *((name, "scheduler", "num_train_timesteps", 10) for name in EULERS),
    *(("wan21", "scheduler", field, True) for field in ("use_karras_sigmas", "use_dynamic_shifting")),
    ("wan21", "scheduler", "prediction_type", "epsilon"),
    ("wan21", "scheduler", "use_flow_sigmas", False),
    *((name, "scheduler", "use_dynamic_shifting", "false") for name in FLOWS),
    *((name, "scheduler", "time_shift_type", "foo") for name in EULERS),
    *((name, "scheduler", "shift_terminal", 1.0) for name in EULERS),
    *((name, "scheduler", "base_shift", "x") for name in DYNAMIC),
    *((name, "scheduler", "max_shift", math.inf) for name in DYNAMIC),
    *((name, "transformer", "axes_lens", value) for name in ("lumina2", "z_image") for value in (3, "x")),
]


@pytest.mark.parametrize("name", FLOWS)
def test_published_configs_are_taken(name: str) -> None:
    for number in range(len(PUBLISHED[name])):
        assert len(used(name, number=number)) == 5


@pytest.mark.parametrize(("name", "part", "field", "value"), WRONG)
def test_wrong_values_are_refused_in_one_line(name: str, part: str, field: str, value: Any) -> None:
    with pytest.raises(InputError) as refused:
        used(name, part, field, value)
    message = str(refused.value)
    others = "takes 17 channels", "the scheduler is of class DDIM", "the scheduler config gives the noise levels"
    assert any(part in message for part in (field, *others)), message
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    "size", [ABSENT, None, "64", 0, 10**9, [64], [64, "64"]], ids=lambda size: "absent" if size is ABSENT else str(size)
)
def test_the_size_of_a_unet_is_checked_without_its_weights(size: Any, tmp_path: Path) -> None:
    folder = copytree(pipeline_folder("sd15"), tmp_path / "copy")
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text()) | {"sample_size": size}
    if size is ABSENT:
        del config["sample_size"]
    path.write_text(json.dumps(config))
    family = find_family(PipelineSource(str(folder)))
    with pytest.raises(InputError, match=r"the network's sample_size is .*, not a size from 1 to 1024"):
        family.latent_shape()


@pytest.mark.parametrize("value", [5, "x", [], ["transformers"], ["diffusers", 3], {"a": 1}, ["a", "b", "c"]])
def test_entries_of_the_index_are_null_or_two_names(value: Any, tmp_path: Path) -> None:
    copytree(pipeline_folder("sd35"), tmp_path / "copy")
    path = tmp_path / "copy" / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "requires_safety_checker": False, "vae": None}))
    assert not PipelineSource(str(tmp_path / "copy")).has("vae")
    path.write_text(json.dumps({**index, "tokenizer_2": value}))
    with pytest.raises(InputError, match=r"model_index.json has tokenizer_2=.*, which must be null or the names of"):
        PipelineSource(str(tmp_path / "copy"))


def test_limits_of_positions() -> None:
    for name, side, prompt in (("lumina2", 1024, 299), ("z_image", 1024, 992)):
        family = FLOWS[name](MadeConfigs(PUBLISHED[name][0]["parts"]))
        assert (family.max_side, family.max_prompt) == (side, prompt)
        assert family.latent_shape(8192, 16) == (16, 1024, 2)
        with pytest.raises(InputError, match="height=8208 is over 8192 pixels, for which this network has positions"):
            family.latent_shape(8208, 16)


def test_a_tokenizer_is_of_the_class_that_the_index_names(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    copytree(TWINS["wan21"].folder, tmp_path / "own")
    path = tmp_path / "own" / "model_index.json"
    index = json.loads(path.read_text())
    for name in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        path.write_text(json.dumps({**index, "tokenizer": ["transformers", name]}))
        found = PipelineSource(str(tmp_path / "own")).tokenizer("tokenizer")
        want = PreTrainedTokenizerFast.from_pretrained(tmp_path / "own" / "tokenizer")
        assert found("two dogs").input_ids == want("two dogs").input_ids
    for name in ("FluxPipeline", "ThirdTokenizer", "BertModel"):
        path.write_text(json.dumps({**index, "tokenizer": ["transformers", name]}))
        with pytest.raises(InputError, match=f"tokenizer is a '{name}' .* which is no tokenizer of transformers"):
            PipelineSource(str(tmp_path / "own")).tokenizer("tokenizer")
    config = tmp_path / "own" / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 20}))
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"tokens, but its text encoder has 20; .*take tokenizer and text_encoder"):
        PipelineSource(str(tmp_path / "own")).tokenizer("tokenizer")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("lumina2", "axes_lens", [10**9, 512, 512]),
        ("z_image", "axes_lens", [1536, 10**9, 512]),
        ("wan21", "rope_max_seq_len", 10**9),
    ],
)
def test_tables_of_positions_that_would_fill_memory_are_refused(
    tmp_path: Path, name: str, field: str, value: Any
) -> None:
    folder = copytree(TWINS[name].folder, tmp_path / name)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(InputError, match=f"config.json has a {field} above 65536"):
        PipelineSource(str(folder)).load(getattr(diffusers, FLOWS[name].network_class), "transformer")
