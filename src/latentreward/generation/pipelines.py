"""Wrapping of a loaded diffusers pipeline as a policy, so that rewards can score its sampling states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from latentreward.errors import InputError
from latentreward.noise import process_from_scheduler
from latentreward.policies import AdapterSwitch, DiTPolicy, Policy, UNetPolicy

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def policy_of(pipeline: DiffusionPipeline) -> Policy:
    """Wrap a Stable Diffusion 1.5, 2.1, XL, 3 or 3.5 pipeline as a policy.

    Network and VAE are shared with the pipeline, and the pipeline's active LoRAs stay active. The policy has no text
    encoder: the pipeline encodes the prompts.

    Raises:
        InputError: If the pipeline has neither a U-Net nor an SD3 transformer.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from latentreward.encoders.vae import LatentEncoder

    family: type[Policy]
    if getattr(pipeline, "unet", None) is not None:
        family, network = UNetPolicy, pipeline.unet
    elif type(getattr(pipeline, "transformer", None)).__name__ == "SD3Transformer2DModel":
        family, network = DiTPolicy, pipeline.transformer
    else:
        raise InputError(
            f"{type(pipeline).__name__} has no U-Net and no SD3 transformer; use a pipeline of SD1.5, SD2.1, SDXL, SD3 "
            "or SD3.5"
        )
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    vae, scheduler = LatentEncoder(pipeline.vae), pipeline.scheduler
    config: dict[str, Any] = {"_class_name": type(scheduler).__name__, **scheduler.config}
    policy = family(network, process_from_scheduler(config), vae.space, config, vae=vae)
    if active:
        policy.adapters = AdapterSwitch(network, active)
    policy.source = type(pipeline).__name__
    return policy
