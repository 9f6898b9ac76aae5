"""From a diffusers pipeline, in a folder or on the hub, to a policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from latentreward.backbones.loading import PipelineSource, check_channels, set_execution, tiny_pipeline
from latentreward.backbones.tuning import LoRA, StorageDtype, store_frozen
from latentreward.contracts import LatentSpace
from latentreward.errors import InputError, first_line
from latentreward.policies.policy import POLICY, DiTPolicy, Policy, UNetPolicy
from latentreward.seeding import pair_generator

if TYPE_CHECKING:
    from latentreward.encoders.prompts import PromptEncoder

SHIPPED = ("sd_tiny", "sd35_tiny")
"""Names of the pipelines of the tiny world."""


@dataclass
class PolicySource:
    """The generator to align, and its adapter. Nothing heavy is loaded until :meth:`load`.

    Attributes:
        source: Diffusers pipeline folder, hub id, or ``sd_tiny`` or ``sd35_tiny`` for a shipped one.
        revision: Branch, tag or commit of a hub id.
        variant: File variant of the weights, such as ``fp16``.
        lora: The adapter that trains.
        gradient_checkpointing: Recompute block activations in the backward pass: less memory, about a third slower.
        attention_backend: Name of a diffusers attention backend, such as ``flash``; None keeps PyTorch's own.
        frozen_dtype: Storage of the network and its text encoders; ``bfloat16`` goes with ``precision: bf16-mixed``.
        vae_dtype: Precision of the VAE.
        load_t5: False leaves T5 out (SD3): 9.5 GB less in bfloat16, at some loss for long prompts.
        t5_length: T5 tokens per prompt (SD3; zeros without T5); None takes 256, or none for a shipped pipeline.
        compile_blocks: Compile each block with ``torch.compile``.
    """

    source: str = "sd_tiny"
    revision: str | None = None
    variant: str | None = None
    lora: LoRA = field(default_factory=lambda: LoRA(rank=4, alpha=4.0))
    gradient_checkpointing: bool = False
    attention_backend: str | None = None
    frozen_dtype: StorageDtype = "float32"
    vae_dtype: StorageDtype = "float32"
    load_t5: bool = True
    t5_length: int | None = None
    compile_blocks: bool = False

    def pipeline(self) -> PipelineSource:
        """The pipeline's configs."""
        source = tiny_pipeline(self.source) if self.source in SHIPPED else self.source
        return PipelineSource(source, self.revision, self.variant)

    def latent_space(self) -> LatentSpace:
        """The latents it makes, read from configs alone."""
        return self.pipeline().latent_space()

    def load(self, seed: int = 0) -> Policy:
        """Load network, encoders and VAE, and add the adapter; only the adapter trains.

        Args:
            seed: Seed of the adapter's initial values.

        Raises:
            InputError: If the source is no text-to-image pipeline, or no layer matches ``lora.target_modules``.
        """
        if self.t5_length is not None and self.t5_length < 0:
            raise InputError(f"t5_length={self.t5_length} must be at least 0")
        pipeline = self.pipeline()
        latent_space, process, sdxl = pipeline.latent_space(), pipeline.noise_process(), False
        network: Any
        text_encoder: PromptEncoder
        family: type[Policy]
        if pipeline.has("unet"):
            config, family = self._config(pipeline, "unet", "UNet2DConditionModel", latent_space), UNetPolicy
            sdxl = config.get("addition_embed_type") == "text_time"
            text_encoder = pipeline.sdxl_prompts() if sdxl else pipeline.clip_prompts()
            network = pipeline.unet()
        else:
            config, family = self._config(pipeline, "transformer", "SD3Transformer2DModel", latent_space), DiTPolicy
            length = (0 if self.source in SHIPPED else 256) if self.t5_length is None else self.t5_length
            text_encoder = pipeline.sd3_prompts(config["joint_attention_dim"], length, self.load_t5)
            network = pipeline.transformer()
        network.requires_grad_(False)
        add_lora(network, self.lora, POLICY, seed)
        store_frozen(network, self.frozen_dtype)
        text_encoder.requires_grad_(False)
        store_frozen(text_encoder, self.frozen_dtype)
        policy = family(
            network,
            process,
            latent_space,
            pipeline.config("scheduler"),
            text_encoder,
            pipeline.latent_encoder(self.vae_dtype),
            zero_uncond=bool(pipeline.index.get("force_zeros_for_empty_prompt", sdxl)),  # diffusers' defaults
        ).train()
        policy.source = str(pipeline)
        execution = self.gradient_checkpointing, self.attention_backend, self.compile_blocks
        set_execution(policy.blocks(), network, *execution)
        return policy

    def _config(self, pipeline: PipelineSource, part: str, family: str, space: LatentSpace) -> dict[str, Any]:
        """Config of the network, before anything heavy is loaded: a text-to-image one of a kind that is known here."""
        config = pipeline.config(part)
        if config.get("_class_name", family) != family:
            raise InputError(
                f"source={self.source!r} has a {config['_class_name']} as {part}; a policy needs a {family}, as SD1.5, "
                "SD2.1, SDXL, SD3 and SD3.5 have it"
            )
        check_channels(self.source, part, config, space)
        return config


def add_lora(network: nn.Module, lora: LoRA, name: str, seed: int) -> None:
    """Add an adapter ``name`` to ``network``, starting as no change; the other parameters stay as they are.

    A is drawn from N(0, 1 / rank²), B is zero, as peft's ``gaussian``; here draws depend on seed and name alone.

    Raises:
        InputError: If no layer matches ``lora.target_modules``.
    """
    from peft import LoraConfig

    config: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    try:
        network.add_adapter(
            LoraConfig(**config, target_modules=list(lora.target_modules), init_lora_weights="gaussian"), name
        )
    except ValueError as error:
        raise InputError(f"lora.target_modules={list(lora.target_modules)}: {first_line(error)}") from error
    for place, weight in network.named_parameters():
        if place.endswith(f".lora_A.{name}.weight"):
            with torch.device("cpu"):
                drawn = torch.randn(weight.shape, generator=pair_generator(seed, "adapter", 0, place))
            weight.data.copy_(drawn / lora.rank)
