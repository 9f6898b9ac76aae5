"""Published configs of every family on the meta device: parameters, spaces, levels' constants."""

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from latentreward.alignment import PolicySource
from latentreward.apps.estimate.pipelines import HUB_IDS, PIPELINES, write_pipelines
from latentreward.core.registry import create_backbone
from latentreward.diffusion import Family
from tests.marks import rotated_after

# Parameters in billions, as counted on the meta device with diffusers 0.42: whole network, first half and first third
# of the blocks. FLUX.1 [12B], Z-Image [6B], Qwen-Image [20B], klein [4B, 9B], SD3.5-Large [8B], Wan [1.3B, 14B] agree
# with the sizes that the model cards name.
BILLIONS = {
    "black-forest-labs/FLUX.1-dev": ("flux1", 57, 11.901, 7.918, 6.502),
    "black-forest-labs/FLUX.1-schnell": ("flux1", 57, 11.891, None, None),
    "black-forest-labs/FLUX.1-Kontext-dev": ("flux1_kontext", 57, 11.901, None, None),
    "Tongyi-MAI/Z-Image": ("z_image", 30, 6.155, 3.440, 2.535),
    "Tongyi-MAI/Z-Image-Turbo": ("z_image", 30, 6.155, 3.440, 2.535),
    "Qwen/Qwen-Image": ("qwen_image", 60, 20.430, 10.216, 6.818),
    "Qwen/Qwen-Image-Edit": ("qwen_image_edit", 60, 20.430, None, None),
    "Qwen/Qwen-Image-Edit-2511": ("qwen_image_edit", 60, 20.430, 10.216, 6.818),
    "black-forest-labs/FLUX.2-klein-4B": ("flux2_klein", 25, 3.876, 2.384, 1.893),
    "black-forest-labs/FLUX.2-klein-base-9B": ("flux2_klein", 32, 9.079, 5.555, 4.464),
    "lodestones/Chroma1-HD": ("chroma", 57, 8.900, 5.728, 4.595),
    "baidu/ERNIE-Image": ("ernie_image", 36, 8.033, 4.073, 2.765),
    "ideogram-ai/ideogram-4-nf4-diffusers": ("ideogram4", 34, 9.279, 4.784, 3.462),
    "krea/Krea-2-Raw": ("krea2", 28, 12.820, 6.741, 5.005),
    "Alpha-VLLM/Lumina-Image-2.0": ("lumina2", 26, 2.610, 1.472, 1.123),
    "stabilityai/stable-diffusion-3.5-large": ("sd35_large", 38, 8.057, 4.075, 2.797),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("wan21", 30, 1.419, 0.722, 0.490),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("wan21", 40, 14.288, 7.260, 5.152),
}


@cache
def folder_of(model: str) -> str:
    name = HUB_IDS[model]
    return write_pipelines(Path(mkdtemp()), {name: PIPELINES[name]}, [])[name]


def billions(network: torch.nn.Module) -> float:
    return sum(weight.numel() for weight in network.parameters()) / 1e9


pytestmark = pytest.mark.slow


# Computed by `latentreward fit --estimate`: peak in GB and TFLOP of an optimiser step, of the reward and of LPO. One of
# pictures and one of clips: those of larger networks take a minute each; benchmarks/estimates.py computes all.
@pytest.fixture
def on_the_meta_device() -> Iterator[None]:
    with torch.device("meta"):
        yield


@pytest.mark.usefixtures("on_the_meta_device")
@pytest.mark.parametrize("model", rotated_after(1, BILLIONS))
def test_whole_networks(model: str) -> None:
    family: Family = PolicySource(folder_of(model)).resolve_family()
    _, blocks, total, _, _ = BILLIONS[model]
    network = family.load_network()
    assert sum(1 for _ in family.blocks(network)) == blocks
    assert billions(network) == pytest.approx(total, abs=0.0006)


@pytest.mark.usefixtures("on_the_meta_device")
@pytest.mark.parametrize("model", rotated_after(3, [model for model, row in BILLIONS.items() if row[3]]))
def test_first_blocks(model: str) -> None:
    name, blocks, _, half, third = BILLIONS[model]
    for share, wanted in ((2, half), (3, third)):
        kept = math.ceil(blocks / share)
        options = {"num_layers": kept, "visual_taps": [kept], "text_taps": [], "tuning": "frozen"}
        backbone = create_backbone(name, source=folder_of(model), **options)
        found = billions(backbone.transformer)
        if name == "sd35_large":  # keeps its output layers, as all backbones of SD3
            found -= sum(billions(backbone.transformer.get_submodule(part)) for part in ("norm_out", "proj_out"))
        assert found == pytest.approx(wanted, abs=0.0006)


@pytest.mark.usefixtures("on_the_meta_device")
def test_members_of_a_space() -> None:
    spaces = {model: PolicySource(folder_of(model)).latent_space() for model in BILLIONS}
    flux = spaces["black-forest-labs/FLUX.1-dev"]
    assert {model for model, space in spaces.items() if space == flux} == {
        model for model, row in BILLIONS.items() if row[0] in ("flux1", "flux1_kontext", "z_image", "lumina2", "chroma")
    }
    wan = spaces["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    assert {model for model, space in spaces.items() if space == wan} == {
        model for model, row in BILLIONS.items() if row[0] in ("wan21", "qwen_image", "qwen_image_edit", "krea2")
    }
    klein = spaces["black-forest-labs/FLUX.2-klein-4B"]
    assert klein.shape(1024, 1024) == (128, 64, 64) and klein.codec == "batch_norm"
    assert spaces["baidu/ERNIE-Image"] == klein
