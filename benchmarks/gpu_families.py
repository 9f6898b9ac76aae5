"""Families of generators on one GPU, for the block ``families`` of ``gpu.py``: reward and policy of each model."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from latentreward.alignment import POLICY
from latentreward.alignment.policies.loading import add_lora
from latentreward.apps.estimate.pipelines import HUB_IDS, PIPELINES, write_json, write_pipelines
from latentreward.core.contracts import Conditioning
from latentreward.diffusion import FamilyBackbone, FlowFamily, LoRA, SD3DiTBackbone, find_family
from latentreward.diffusion.backbones.loading import PipelineSource
from latentreward.reward import GatedQFormerHead

MODELS = (
    "black-forest-labs/FLUX.1-dev",
    "Tongyi-MAI/Z-Image",
    "Qwen/Qwen-Image",
    "stabilityai/stable-diffusion-3.5-large",
    "black-forest-labs/FLUX.2-klein-4B",
    "black-forest-labs/FLUX.2-klein-9B",
    "Alpha-VLLM/Lumina-Image-2.0",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers",
)
"""Models by hub id; SD3.5-Medium is in the other blocks."""
TINY: Mapping[str, Mapping[str, Any]] = {
    "flux1": {"num_layers": 2, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
              "axes_dims_rope": (4, 6, 6)},
    "z_image": {"dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "axes_dims": (4, 6, 6)},
    "qwen_image": {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)},
    "flux2_klein": {"num_layers": 2, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
                    "axes_dims_rope": (4, 4, 4, 4)},
    "lumina2": {"hidden_size": 32, "num_layers": 3, "num_refiner_layers": 1, "num_attention_heads": 2,
                "num_kv_heads": 1, "axes_dim_rope": (4, 6, 6)},
    "sd3": {"sample_size": 16, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
            "caption_projection_dim": 32, "pos_embed_max_size": 16},
    "wan21": {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "ffn_dim": 64, "freq_dim": 32},
}  # fmt: skip
"""Family → entries of the network's config that make it tiny."""
TOKENS = 128
"""Tokens of the prompt; every network takes fewer than its pipeline's most."""


class RandomModel:
    """Network of a model with random weights, and random latents and prompt for it.

    Args:
        model: Hub id.
        device: Device.
        dtype: Type of the weights.
        tiny: Whether to take a tiny network and a small image.
    """

    def __init__(self, model: str, device: str, dtype: torch.dtype, tiny: bool) -> None:
        name, self.device, self.dtype = HUB_IDS[model], device, dtype
        parts = {part: dict(config) for part, config in PIPELINES[name].items()}
        self.configs = TemporaryDirectory()  # which the family reads at any time
        folder = Path(self.configs.name)
        write_pipelines(folder, {name: parts}, [])
        family = find_family(PipelineSource(str(folder / name)))
        if tiny:
            write_json(folder / name / family.part / "config.json", parts[family.part] | TINY[family.name])
            family = find_family(PipelineSource(str(folder / name)))
        self.family = family
        size = (32, 32) if tiny else (1024, 1024)
        generator = torch.Generator(device).manual_seed(0)
        self.latents = torch.randn(1, *family.latent_shape(*size), device=device, generator=generator)
        with torch.device("meta"):
            self.encoder = encoder = family.load_prompt_encoder()  # for its widths
        embeds = torch.randn(1, TOKENS, encoder.token_dim, device=device, generator=generator)
        pooled = torch.zeros(1, encoder.pooled_dim, device=device) if encoder.pooled_dim else None
        mask = torch.ones(1, TOKENS, dtype=torch.bool, device=device) if encoder.masked else None
        self.conditioning = Conditioning(embeds, pooled, mask)
        self.timesteps = torch.full((1,), 501.0, device=device)

    def network(self) -> Any:
        """Make the network; matrices are random numbers of N(0, 0.02²), other weights 1."""
        with init_empty_weights():
            network = getattr(diffusers, self.family.network_class).from_config(self.family.config)
        network.requires_grad_(False)
        network.gradient_checkpointing = False
        return network

    def fill(self, network: nn.Module) -> nn.Module:
        """Give a network's weights values on the device."""
        generator = torch.Generator(self.device).manual_seed(0)
        for module in network.modules():
            for name, old in module._parameters.items():
                if old is not None and old.is_meta:
                    dtype = torch.float32 if old.requires_grad else self.dtype
                    new = torch.ones(old.shape, dtype=dtype, device=self.device)
                    value = new.normal_(0, 0.02, generator=generator) if old.ndim > 1 else new
                    module._parameters[name] = nn.Parameter(value, old.requires_grad)
            for name, old in module._buffers.items():
                module._buffers[name] = None if old is None else old.to(self.device)
        return network

    def reward(self) -> Callable[[], None]:
        """Return the scoring of one latent by the first half of the blocks and a Q-Former."""
        network = self.network()
        kept = -(-sum(1 for _ in self.family.blocks(network)) // 2)
        taps = sorted({max(1, kept // 3), max(1, 2 * kept // 3), kept})
        if isinstance(self.family, FlowFamily):
            text = [] if self.family.constant_text else taps
            backbone = FamilyBackbone(network, self.family, kept, taps, text, text_encoder=self.encoder)
        else:
            process, space = self.family.noise_process, self.family.latent_space
            backbone = SD3DiTBackbone(network, process, space, kept, taps, taps, text_encoder=self.encoder)
        self.fill(network)
        head = GatedQFormerHead(backbone.feature_spec, num_heads=2).to(self.device).requires_grad_(False)

        def work() -> None:
            with torch.no_grad():
                head(backbone(self.latents, self.timesteps, self.conditioning))

        return work

    def policy_step(self) -> Callable[[], None]:
        """Return a pass of the whole network and back to its adapters, with checkpointed blocks."""
        network = self.network()
        add_lora(network, LoRA(16, 16.0), POLICY, 0, self.family)
        self.fill(network)
        network.train().enable_gradient_checkpointing()

        def work() -> None:
            output: Tensor = self.family.predict(network, self.latents, self.timesteps, self.conditioning, None)
            output.float().square().mean().backward()

        return work


def family_rows(model: str, device: str, dtype: torch.dtype, tiny: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield a name and the work of each row of a model; the network of one row is freed before the next."""
    made, short = RandomModel(model, device, dtype, tiny), model.rpartition("/")[2]
    yield f"{short}, reward on half of the blocks", made.reward()
    yield f"{short}, step of the policy", made.policy_step()
