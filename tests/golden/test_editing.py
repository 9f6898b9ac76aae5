"""Editors: velocities, guidance, taps and sizes of sources."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from zlib import crc32

import diffusers
import pytest
import torch
from torch import Tensor, nn

from latentreward.alignment import Policy
from latentreward.core.contracts import Conditioning
from latentreward.core.errors import InputError
from latentreward.diffusion import FamilyBackbone, FlowFamily, SDUNetBackbone
from latentreward.diffusion.families.flux1 import Flux1Kontext
from latentreward.diffusion.families.flux2_klein import Flux2Klein
from latentreward.diffusion.families.instruct_pix2pix import InstructPix2Pix
from latentreward.diffusion.families.qwen_image_edit import QwenImageEdit
from tests.diffusion.families.made_configs import MadeConfigs
from tests.golden.catalogue import Case, Tensors, cases

SPACE = {"block_out_channels": [1, 1, 1, 1], "scaling_factor": 1.0, "shift_factor": 0.0}
DDPM = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
FAMILIES: Mapping[str, tuple[type[FlowFamily], dict[str, Any]]] = {
    "kontext": (Flux1Kontext, {**SPACE, "latent_channels": 16}),
    "klein": (Flux2Klein, {**SPACE, "latent_channels": 32}),
    "qwen_edit": (
        QwenImageEdit,
        {
            "z_dim": 16,
            "temperal_downsample": [False, True, True],
            "latents_mean": [0.0] * 16,
            "latents_std": [1.0] * 16,
        },
    ),
}
editors = pytest.mark.parametrize(
    "case",
    [case for kind in ("kontext", "klein", "qwen_edit", "qwen_edit_zero_cond_t") for case in cases(f"editing/{kind}")],
    ids=lambda case: case.name,
)


class Configs(MadeConfigs):
    """Configs whose VAE has statistics too."""

    def tensors(self, part: str, names: Any) -> list[Tensor]:
        return [torch.zeros(128), torch.ones(128)]


def family_of(case: Case) -> FlowFamily:
    kind, vae = FAMILIES[case.options["kind"]]
    return kind(Configs({"transformer": case.options["network"]["config"], "vae": vae}))


def network_of(case: Case) -> nn.Module:
    """The case's network with the recipe's weights."""
    made = case.options["network"]
    network = getattr(diffusers, made["class"])(**made["config"]).eval()
    for name, weight in network.named_parameters():
        drawn = torch.randn(
            weight.shape, generator=torch.Generator().manual_seed(made["seed"] * 1_000_003 + crc32(name.encode()))
        )
        if weight.ndim > 1:
            drawn /= math.sqrt(weight[0].numel())
        else:
            drawn = drawn / 10 + ("norm" in name and name.endswith("weight"))
        weight.data.copy_(drawn)
    total = sum(weight.double().abs().sum().item() for weight in network.parameters())
    assert total == pytest.approx(made["sums"][0], rel=1e-6)
    return network


def conditioning_of(data: Tensors, sources: int, prefix: str = "") -> Conditioning:
    mask = data[f"in.{prefix}mask"].bool() if f"in.{prefix}mask" in data else None
    pooled = data.get("in.pooled")
    given = tuple(data[f"in.source_{number}"] for number in range(sources))
    return Conditioning(data[f"in.{prefix}text"], pooled, mask, given)


def assert_equal(found: Tensor, expected: Tensor, name: str) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1), name


@editors
@torch.no_grad()
def test_predictions(case: Case) -> None:
    data, options, family, network = case.tensors(), case.options, family_of(case), network_of(case)
    given = conditioning_of(data, options["sources"])
    at = data["in.latents"], data["in.sigma"]
    found = {
        "velocity": family.velocity(network, *at, given, options["guidance"]),
        "plain": family.velocity(network, *at, replace(given, source_latents=()), options["guidance"]),
    }
    if "out.guided" in data:
        without = family.velocity(network, *at, conditioning_of(data, options["sources"], "uncond_"), None)
        found["guided"] = family.guide(found["velocity"], without, options["guidance"])
    for name, value in found.items():
        assert_equal(value, data[f"out.{name}"], name)


@editors
@torch.no_grad()
def test_features_are_those_of_the_picture_that_is_made(case: Case) -> None:
    data, options = case.tensors(), case.options
    given = conditioning_of(data, options["sources"])
    backbone = FamilyBackbone(network_of(case), family_of(case), None, options["taps"], options["taps"])
    features = backbone.read(data["in.latents"], 1000 * data["in.sigma"], given)
    for place, tap in enumerate(options["taps"]):
        assert_equal(features.visual[place], data[f"out.tap_{tap}_image"], f"tap {tap}")
        assert_equal(features.text[place], data[f"out.tap_{tap}_text"], f"text at tap {tap}")
        assert features.visual[place].shape[1] == math.prod(features.visual_grids[place])


@editors
@torch.no_grad()
def test_tokens_of_sources(case: Case) -> None:
    """Between blocks too, so that a rule for them alone, as in 2511, is seen."""
    data, options, family = case.tensors(), case.options, family_of(case)
    given, latents = conditioning_of(data, options["sources"]), data["in.latents"]
    made, *edited = (math.prod(grid) for grid in family.grids(latents, given))
    backbone = FamilyBackbone(network_of(case), family, None, options["taps"], [])
    with backbone.recorded([]) as seen:
        family.velocity(backbone.transformer, latents, data["in.sigma"], given, None)
    for tap in options["taps"]:
        sources = family.split(tap, seen[tap], made + sum(edited), given)[0][:, made:]
        assert_equal(sources, data[f"out.tap_{tap}_sources"], f"sources at tap {tap}")


@pytest.mark.parametrize("case", cases("editing/klein"), ids=lambda case: case.name)
@torch.no_grad()
def test_the_rule_of_kv_releases_is_another_one(case: Case) -> None:
    """Their pipeline is refused: references attend to each other alone, and are modulated at time 0."""
    data, family, network = case.tensors(), family_of(case), network_of(case)
    given = conditioning_of(data, case.options["sources"])
    found = family.velocity(network, data["in.latents"], data["in.sigma"], given, case.options["guidance"])
    assert (found - data["out.velocity_kv"]).abs().max() > 0.05


@pytest.mark.parametrize("case", cases("editing/ip2p"), ids=lambda case: case.name)
@torch.no_grad()
def test_instruct_pix2pix(case: Case) -> None:
    data, options, network = case.tensors(), case.options, network_of(case)
    vae = SPACE | {"latent_channels": 4, "scaling_factor": options["scaling_factor"]}
    family = InstructPix2Pix(MadeConfigs({"unet": options["network"]["config"], "vae": vae, "scheduler": DDPM}))
    family.set_image_guidance(options["image_guidance"])
    source = options["scaling_factor"] * data["in.source_0"]
    text, empty = data["in.text"], data["in.uncond_text"]
    prompts, empty = Conditioning(text, text[:, 0], None, (source,)), Conditioning(empty, empty[:, 0])
    given = data["in.latents"], data["in.timesteps"], prompts
    assert_equal(family.predict(network, *given, None), data["out.noise"], "noise")
    assert_equal(
        Policy(network, family).predict_guided(*given, empty, options["guidance"]), data["out.guided"], "guided"
    )
    backbone = SDUNetBackbone(network, family.noise_process, family.latent_space, options["taps"], ())
    below: list[Tensor] = []
    network.down_blocks[options["taps"][0] - 1].register_forward_hook(lambda block, inputs, out: below.append(out[0]))
    middle = backbone.read(*given).visual[-1]
    assert_equal(below[0], data["out.tap_1"], "the first block, with its downsampler")
    assert_equal(middle, data["out.tap_3"].flatten(2).transpose(1, 2), "the middle block")


@pytest.mark.parametrize("case", cases("editing/sizes"), ids=lambda case: case.name)
def test_sizes_of_sources(case: Case) -> None:
    kinds = {"kontext": Flux1Kontext, "qwen": QwenImageEdit, "klein": Flux2Klein}
    vae = {**SPACE, "block_out_channels": [1] * 3, "latent_channels": 16}  # the sizes were recorded with a small VAE
    families = {name: kind(MadeConfigs({"vae": vae})) for name, kind in kinds.items()}
    families["klein"] = Flux2Klein(Configs({"vae": {**vae, "block_out_channels": [1] * 4}}))
    for row in case.options["table"]:
        width, height = row["image"]
        if row["klein"] is None:
            with pytest.raises(InputError, match="sides of at least 64 pixels"):
                families["klein"].source_size(height, width)
        else:
            resized, cropped = families["klein"].source_size(height, width)
            assert [[*resized[::-1]], [*cropped[::-1]]] == row["klein"]
        for name, expected in (("kontext", row["kontext"]), ("qwen", row["qwen"][0])):
            assert [*families[name].source_size(height, width).resized[::-1]] == expected, (name, row["image"])
