"""Loading of a policy from a diffusers pipeline, in a folder or on the hub."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from latentreward.alignment.policies.policy import POLICY, Policy
from latentreward.core.contracts import LatentSpace, PathText
from latentreward.core.errors import InputError, check_range, first_line
from latentreward.core.running import pair_generator
from latentreward.diffusion import Family, LoRA, find_family
from latentreward.diffusion.backbones.loading import PipelineSource, set_execution
from latentreward.diffusion.backbones.tuning import StorageDtype, shown_as_float32, warn_of_layers
from latentreward.diffusion.backbones.weights import Quantization, check_quantization, settle


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
        t5_length: T5 tokens per prompt (SD3, FLUX.1, Wan); zeros stand for SD3's if T5 is not loaded. None takes the
            family's own number: 256 for SD3, 0 for a shipped pipeline.
        quantization: Storage of the frozen linear layers of the network's blocks: ``int8`` (torchao) or ``nf4``
            (bitsandbytes, on a GPU). None keeps ``frozen_dtype``.
        source_size: Size of the pictures that an editor edits: ``made`` resizes each, around its centre, to the size of
            the pictures that are made, before any to the native size; ``pipeline`` as the pipeline does, which can
            differ from picture to picture.
        image_guidance_scale: Scale of InstructPix2Pix's guidance towards the picture to edit, at least 1, which is at
            work with a ``guidance_scale`` above 1; None takes the pipeline's own, 1.5.
        family: Import path of the pipeline's :class:`~latentreward.diffusion.Family`, for a family of one's own; None
            finds it among those of this package.
    """

    source: PathText = "sd_tiny"
    revision: str | None = None
    variant: str | None = None
    lora: LoRA = field(default_factory=lambda: LoRA(rank=4, alpha=4.0))
    gradient_checkpointing: bool = False
    attention_backend: str | None = None
    frozen_dtype: StorageDtype = "float32"
    vae_dtype: StorageDtype = "float32"
    load_t5: bool = True
    t5_length: int | None = None
    quantization: Quantization | None = None
    source_size: Literal["made", "pipeline"] = "made"
    image_guidance_scale: float | None = None
    family: str | None = None

    def pipeline(self) -> PipelineSource:
        """Return the reader of the pipeline's configs and parts."""
        return PipelineSource(self.source, self.revision, self.variant)

    def resolve_family(self) -> Family:
        """Return the family of the pipeline, found from its configs; raise InputError if none supports it."""
        family = find_family(self.pipeline(), self.family)
        if self.image_guidance_scale is not None:
            family.set_image_guidance(self.image_guidance_scale)
        return family

    def record(self) -> dict[str, Any]:
        """Return the fields, with the adapter's target modules named, so that equal sources have equal records."""
        targets = self.resolve_family().lora_targets if self.lora.target_modules is None else self.lora.target_modules
        record = vars(self) | {"lora": replace(self.lora, target_modules=tuple(targets))}
        edits = {"source_size": "made", "image_guidance_scale": None}  # folders of pictures made without edits go on
        return {name: value for name, value in record.items() if name not in edits or value != edits[name]}

    def latent_space(self) -> LatentSpace:
        """Return the latent space of the pipeline's VAE, read without loading the VAE."""
        return self.resolve_family().latent_space

    def load(self, seed: int = 0) -> Policy:
        """Load network, text encoders and VAE frozen, and add the trainable adapter."""
        check_range("[0, inf)", t5_length=self.t5_length)
        check_quantization(self.quantization, "lora")
        family = self.resolve_family()
        family.report_assumption("policy")
        text_encoder = family.load_prompt_encoder(self.t5_length, self.load_t5)
        network = family.load_network()
        network.requires_grad_(False)
        add_lora(network, self.lora, POLICY, seed, family)
        text_encoder.requires_grad_(False)
        dtype = getattr(torch, self.frozen_dtype)
        # What trains stays float32, in which an update of 1e-5 of a weight is not lost.
        settle(network, dtype, torch.float32, family.float32_parts)
        settle(text_encoder, dtype, torch.float32)
        policy = Policy(network, family, text_encoder, family.load_latent_encoder(self.vae_dtype)).train()
        policy.source, policy.source_size = str(family.pipeline), self.source_size
        policy.edit_at(None, None)
        execution = self.gradient_checkpointing, self.attention_backend, self.quantization
        set_execution(policy.blocks(), network, *execution)
        return policy


def add_lora(network: Any, lora: LoRA, name: str, seed: int, family: Family) -> None:
    """Add an adapter ``name`` to ``network``; the network's output stays the same until the adapter is trained.

    A is drawn from N(0, 1 / rank²) and B is zero, as with peft's ``init_lora_weights="gaussian"``. Unlike peft's, the
    random numbers depend only on ``seed`` and the names of the parameters.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    endings = list(family.lora_targets if lora.target_modules is None else lora.target_modules)
    if family.idle:
        config["exclude_modules"] = list(family.idle)
    warn_of_layers(network, lora, family)
    try:
        with shown_as_float32(network):
            config["init_lora_weights"] = "gaussian"
            inject_adapter_in_model(LoraConfig(**config, target_modules=endings), network, name)
            network._hf_peft_config_loaded = True  # diffusers' own methods for adapters ask this
    except ValueError as error:
        own = f"family: {type(family).__name__}.lora_targets"
        field = own if lora.target_modules is None else "lora.target_modules"
        raise InputError(f"{field}={endings}: {first_line(error)}") from error
    for parameter, weight in network.named_parameters():
        if parameter.endswith(f".lora_A.{name}.weight"):
            with torch.device("cpu"):
                drawn = torch.randn(weight.shape, generator=pair_generator(seed, "adapter", 0, parameter))
            weight.data.copy_(drawn / lora.rank)
