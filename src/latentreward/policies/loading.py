"""Loading of a policy from a diffusers pipeline, in a folder or on the hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from latentreward.backbones.loading import SHIPPED, PipelineSource, check_channels, set_execution
from latentreward.backbones.tuning import LoRA, StorageDtype, shown_as_float32
from latentreward.backbones.weights import settle
from latentreward.contracts import LatentSpace
from latentreward.errors import InputError, first_line
from latentreward.policies.policy import POLICY, DiTPolicy, Policy, UNetPolicy
from latentreward.seeding import pair_generator

if TYPE_CHECKING:
    from latentreward.encoders.prompts import PromptEncoder


@dataclass
class PolicySource:
    """The pipeline to align, and the adapter to train. Weights are loaded by :meth:`load` only.

    Attributes:
        source: Diffusers pipeline folder, hub id, or ``sd_tiny`` or ``sd35_tiny`` for a shipped one.
        revision: Branch, tag or commit of a hub id.
        variant: File variant of the weights, such as ``fp16``.
        lora: Settings of the trainable adapter.
        gradient_checkpointing: Recompute block activations in the backward pass: less memory, about a third slower.
        attention_backend: Name of a diffusers attention backend, such as ``flash``; None keeps PyTorch's own.
        frozen_dtype: Storage dtype of the frozen weights of network and text encoders; use ``bfloat16`` with
            ``precision: bf16-mixed``.
        vae_dtype: Storage dtype of the VAE.
        load_t5: False does not load T5 (SD3): saves 9.5 GB in bfloat16, at some loss for long prompts.
        t5_length: T5 tokens per prompt (SD3); zeros stand for them if T5 is not loaded. None: 256, or 0 for a shipped
            pipeline.
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
        """Return the reader of the pipeline's configs and parts."""
        return PipelineSource(self.source, self.revision, self.variant)

    def latent_space(self) -> LatentSpace:
        """Return the latent space of the pipeline's VAE, read from configs only."""
        return self.pipeline().latent_space()

    def load(self, seed: int = 0) -> Policy:
        """Load network, text encoders and VAE frozen, and add the trainable adapter.

        Args:
            seed: Seed of the adapter's initial values.

        Raises:
            InputError: If the source is not a supported text-to-image pipeline, ``t5_length`` is negative, or no layer
                matches ``lora.target_modules``.
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
            text_encoder = pipeline.sdxl_prompts(mapped=True) if sdxl else pipeline.clip_prompts(mapped=True)
            network = pipeline.unet(mapped=True)
        else:
            config, family = self._config(pipeline, "transformer", "SD3Transformer2DModel", latent_space), DiTPolicy
            length = (0 if self.source in SHIPPED else 256) if self.t5_length is None else self.t5_length
            text_encoder = pipeline.sd3_prompts(config["joint_attention_dim"], length, self.load_t5, mapped=True)
            network = pipeline.transformer(mapped=True)
        network.requires_grad_(False)
        add_lora(network, self.lora, POLICY, seed)
        text_encoder.requires_grad_(False)
        for module in (network, text_encoder):
            settle(module, getattr(torch, self.frozen_dtype), torch.float32)
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
        """Read the network's config, and check its class and channels before any weight is loaded."""
        config = pipeline.config(part)
        if config.get("_class_name", family) != family:
            raise InputError(
                f"source={self.source!r} has a {config['_class_name']} as {part}; a policy needs a {family}, as SD1.5, "
                "SD2.1, SDXL, SD3 and SD3.5 have it"
            )
        check_channels(self.source, part, config, space)
        return config


def add_lora(network: nn.Module, lora: LoRA, name: str, seed: int) -> None:
    """Add an adapter ``name`` to ``network``; the network's output stays the same until the adapter is trained.

    A is drawn from N(0, 1 / rank²) and B is zero, as with peft's ``init_lora_weights="gaussian"``. Unlike peft's, the
    random numbers depend only on ``seed`` and the names of the parameters.

    Raises:
        InputError: If no layer matches ``lora.target_modules``.
    """
    from peft import LoraConfig

    config: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    try:
        with shown_as_float32(network):
            network.add_adapter(
                LoraConfig(**config, target_modules=list(lora.target_modules), init_lora_weights="gaussian"), name
            )
    except ValueError as error:
        raise InputError(f"lora.target_modules={list(lora.target_modules)}: {first_line(error)}") from error
    for parameter, weight in network.named_parameters():
        if parameter.endswith(f".lora_A.{name}.weight"):
            with torch.device("cpu"):
                drawn = torch.randn(weight.shape, generator=pair_generator(seed, "adapter", 0, parameter))
            weight.data.copy_(drawn / lora.rank)
