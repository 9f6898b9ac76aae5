"""Policies of ``released_alignment.py`` on both sides: equal random weights, given prompts, updates."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from random_pipelines import RandomPipeline, RandomPolicy, pipeline_folder
from torch import Tensor, nn
from torch.optim import AdamW

from latentreward.alignment import POLICY, CallableReward
from latentreward.core.contracts import Conditioning, PromptBatch
from latentreward.diffusion import LoRA
from latentreward.diffusion.backbones.fused_lora import fuse_lora

RATE = 1e-6
TOKENS = 77 + 128
"""Tokens of a prompt in the released scripts for SD3.5."""
TARGETS = tuple(
    f"attn.{name}"
    for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
)
"""Layers with LoRA in the released scripts for SD3.5."""


class FixedPrompts(nn.Module):
    """Stand-in for text encoders that looks up random embeddings, made once; row 0 is that of the empty prompt.

    Rows of the same prompts are put together once, as the released scripts get them.
    """

    sees_sources = False

    def __init__(self, prompts: Sequence[str]) -> None:
        super().__init__()
        generator, self.texts = torch.Generator().manual_seed(1), ["", *prompts]
        embeds = torch.randn(len(self.texts), TOKENS, 4096, generator=generator)
        self.table = Conditioning(embeds, torch.randn(len(self.texts), 2048, generator=generator))
        self.found = dict[tuple[str, ...], Conditioning]()

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """Return the rows of the prompts."""
        if (key := tuple(prompts)) not in self.found:
            self.found[key] = self.table.select([self.texts.index(prompt) for prompt in prompts])
        return self.found[key]


class StoredText(nn.Module):
    """Text encoder that computes the output for a batch of token ids once."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.found = encoder, dict[bytes, Any]()

    def forward(self, ids: Tensor, **options: Any) -> Any:
        """Return the encoder's output for the ids."""
        key = ids.numpy().tobytes()
        if key not in self.found:
            self.found[key] = self.encoder(ids, **options)
        return self.found[key]


def prompts_of(count: int) -> PromptBatch:
    """Return prompts, each with a key of its own."""
    return PromptBatch(tuple(f"prompt {number}" for number in range(count)), tuple(map(str, range(count))))


def prepared(module: Any) -> Any:
    """Give a module a trainer, ``performance.fused_lora``, and adapter weights that change the network's output."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module.trainer = Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **quiet)
    module.log = module.log_dict = lambda *_, **__: None
    fuse_lora(module)
    generator = torch.Generator().manual_seed(2)
    for name, weight in module.policy.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(0, 0.02, generator=generator)
    return module.train()


def dit_policy(size: str) -> RandomPolicy:
    """Return a policy of SD3.5's layout with the released scripts' LoRA, without T5."""
    return RandomPolicy(source=size, lora=LoRA(32, 64.0, target_modules=TARGETS), load_t5=False)


def released_network(network: Any, *adapters: str) -> Any:
    """Return a peft model with the weights of a policy's network and its LoRA; the first adapter is the policy's.

    Other adapters of the network than those of the names ``adapters``, such as a reward's, are left out.
    """
    from peft import LoraConfig, get_peft_model

    own = network.peft_config[POLICY]
    settings = LoraConfig(
        r=own.r, lora_alpha=own.lora_alpha, init_lora_weights="gaussian", target_modules=own.target_modules
    )
    theirs = get_peft_model(type(network).from_config(network.config), settings)
    for name in adapters:
        theirs.add_adapter(name, settings)
    kept = {
        key: weight
        for key, weight in network.state_dict().items()
        if "lora_" not in key or key.split(".")[-2] in (POLICY, *adapters)
    }
    weights = {name.replace(".policy.", ".default."): weight for name, weight in kept.items()}
    theirs.load_state_dict({f"base_model.model.{name}": weight for name, weight in weights.items()})
    for name, weight in theirs.named_parameters():
        weight.requires_grad_(".default." in name)
    return theirs


def dit_pipeline(size: str, module: Any, transformer: Any) -> Any:
    """Return diffusers' pipeline around a peft model, without text encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(RandomPipeline(pipeline_folder(size)).config("scheduler"))
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    vae = module.policy.vae.vae
    pipeline = StableDiffusion3Pipeline(transformer.get_base_model(), scheduler, vae, **dict.fromkeys(parts))
    pipeline.transformer = transformer
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def brightness(modules: list[Any]) -> CallableReward:
    """Return the reward of a module's finished images; the module is appended to ``modules`` later."""

    def score(latents: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        return (modules[0].policy.vae.decode(latents) / 2 + 0.5).clamp(0, 1).mean(dim=(1, 2, 3))

    return CallableReward(score)


def own_update(module: Any, batches: Sequence[Any], clip: bool = True) -> Callable[[], None]:
    """Return our update: forward and backward passes of batches, clipping, AdamW."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = AdamW(weights, RATE)

    def update() -> None:
        for batch in batches:
            result = module.training_step(batch, 0)
            ((result["loss"] if isinstance(result, dict) else result) / len(batches)).backward()
        if clip:
            nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def given(prompts: Conditioning, uncond: Conditioning | None = None) -> dict[str, Tensor]:
    """Return embeddings as a released sampler takes them."""
    one = {"prompt_embeds": prompts.prompt_embeds, "pooled_prompt_embeds": prompts.pooled_prompt_embeds}
    other = {} if uncond is None else {f"negative_{name}": value for name, value in given(uncond).items()}
    return {name: value for name, value in (one | other).items() if value is not None}
