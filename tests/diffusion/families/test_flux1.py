"""FLUX.1: levels, embedded guidance, lengths of prompts, and what is refused."""

from collections.abc import Mapping
from typing import Any

import pytest

from latentreward.core.errors import InputError
from latentreward.diffusion import find_family
from latentreward.diffusion.noise.schedules import EULER
from tests.diffusion.families.made_configs import MadeConfigs

VAE = {"latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "scaling_factor": 0.3611,
       "shift_factor": 0.1159}  # fmt: skip
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15,
           "base_image_seq_len": 256, "max_image_seq_len": 4096}  # fmt: skip
STATIC = {"shift": 1.0}


def family(dev: bool = True, index: Mapping[str, Any] | None = None, **network: Any) -> Any:
    transformer = {"_class_name": "FluxTransformer2DModel", "in_channels": 64, "guidance_embeds": dev, **network}
    parts = {
        "transformer": transformer,
        "vae": VAE,
        "scheduler": {"_class_name": EULER, **(DYNAMIC if dev else STATIC)},
    }
    return find_family(MadeConfigs(parts, **{"_class_name": "FluxPipeline", **(index or {})}))


def test_guidance_is_an_input_of_dev() -> None:
    dev, schnell = family(), family(dev=False)
    assert (dev.guidance(None), dev.guidance(0.0), dev.guidance(1.0)) == (3.5, 0.0, 1.0)
    assert not any(kind.needs_uncond(scale) for kind in (dev, schnell) for scale in (None, 1.0, 3.5))
    with pytest.raises(InputError, match="guidance_scale=-1 must be at least 0"):
        dev.guidance(-1.0)
    assert (schnell.guidance(None), schnell.guidance(schnell.no_guidance)) == (None, 1.0)
    with pytest.raises(InputError, match=r"FLUX.1-schnell was distilled to sample without guidance"):
        schnell.guidance(3.5)
