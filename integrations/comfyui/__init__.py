"""ComfyUI's nodes that score latents with a latent reward while they are sampled, and sample only the best on.

Facts of ComfyUI are from its ``comfy/samplers.py``, ``comfy/model_sampling.py`` and ``nodes.py`` (0.3.64, a125cd8).
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentreward.core.errors import InputError, check_at_least_one

if TYPE_CHECKING:
    from latentreward.diffusion import NoiseProcess
    from latentreward.reward import RewardModel

STEPS = "As in the sampler; one more for dpm_2, dpm_2_ancestral and uni_pc, which leave one level out."
STEP = """end_at_step of the sampler, which has return_with_leftover_noise on. From the last step on, latents are
finished, and get the reward's default noise; before the first, ComfyUI's latents hold no noise to score."""


class LatentRewardLoad:
    """Load a stored reward model for the other two nodes."""

    DESCRIPTION = "Load a latent reward, which scores noisy latents. It must be of the family of the MODEL."
    CATEGORY, FUNCTION = "latentreward", "load"
    RETURN_TYPES, RETURN_NAMES = ("LATENT_REWARD",), ("reward",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        source = {"default": "", "tooltip": "Run, model folder or hub id, as for `latentreward score --model`."}
        base = {"default": "", "tooltip": "Diffusers pipeline of the reward's base; empty: the one that it names."}
        dtype = ["float32", "bfloat16"]
        return {"required": {"source": ("STRING", source), "base": ("STRING", base), "dtype": (dtype,)}}

    def load(self, source: str, base: str, dtype: str) -> tuple[RewardModel]:
        """Load the reward into main memory, without the VAE, which latents do not need."""
        from latentreward.reward import RewardModel

        reward = RewardModel.from_pretrained(source, dtype=getattr(torch, dtype), base=base or None)
        reward.backbone.vae = None
        return (reward,)


class LatentRewardScore:
    """Score each latent of a batch after a number of steps."""

    DESCRIPTION = "Score noisy or finished latents for a prompt. A higher score is better."
    CATEGORY, FUNCTION = "latentreward", "score"
    RETURN_TYPES, RETURN_NAMES, OUTPUT_IS_LIST = ("STRING", "FLOAT"), ("text", "scores"), (False, True)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        import comfy.samplers

        return {
            "required": {
                "reward": ("LATENT_REWARD",),
                "model": ("MODEL", {"tooltip": "The sampler's, after any patch of its noise levels."}),
                "latent": ("LATENT",),
                "prompt": ("STRING", {"multiline": True}),
                "scheduler": (comfy.samplers.KSampler.SCHEDULERS, {"tooltip": "As in the sampler."}),
                "steps": ("INT", {"default": 20, "min": 1, "max": 10000, "tooltip": STEPS}),
                "step": ("INT", {"default": 4, "min": 1, "max": 10000, "tooltip": STEP}),
            }
        }

    def score(self, **inputs: Any) -> tuple[str, list[float]]:
        """Return the scores as lines and as numbers."""
        scores = score_latents(**inputs)
        return table(scores), scores.tolist()


class LatentRewardKeepBest:
    """Keep the latents of a batch with the highest scores, best first."""

    DESCRIPTION = "Keep the best latents of a batch, best first, so that the next sampler finishes these alone."
    CATEGORY, FUNCTION = "latentreward", "choose"
    RETURN_TYPES, RETURN_NAMES = ("LATENT", "STRING"), ("latent", "text")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        keep = ("INT", {"default": 1, "min": 1, "max": 4096, "tooltip": "Number of latents to keep."})
        return {"required": {**LatentRewardScore.INPUT_TYPES()["required"], "keep": keep}}

    def choose(self, keep: int, latent: dict[str, Any], **inputs: Any) -> tuple[dict[str, Any], str]:
        """Return the best rows of a LATENT, and all scores as lines."""
        samples = latent["samples"]
        check_at_least_one(keep=keep)
        if keep > len(samples):
            raise InputError(f"keep={keep}, but the batch has {len(samples)} latents; keep fewer, or sample more")
        scores = score_latents(latent=latent, **inputs)
        best = scores.argsort(descending=True, stable=True)[:keep].tolist()
        kept = {**latent, "samples": samples[best]}
        if (mask := latent.get("noise_mask")) is not None:  # one of fewer rows is repeated over the batch
            kept["noise_mask"] = mask[[row % len(mask) for row in best]]
        if (index := latent.get("batch_index")) is not None:
            kept["batch_index"] = [index[row] for row in best]
        return kept, table(scores, best)


def score_latents(
    reward: RewardModel, model: Any, latent: dict[str, Any], prompt: str, scheduler: str, steps: int, step: int
) -> Tensor:
    """Score a LATENT after ``step`` of ``steps`` on ComfyUI's device; returns ``(N,)`` float32 on the CPU."""
    import comfy.model_management as management
    import comfy.samplers

    check_at_least_one(steps=steps, step=step)
    check_space(reward, model, latent["samples"])
    latents = model.get_model_object("process_latent_in")(latent["samples"].float())
    sampling, device = model.get_model_object("model_sampling"), management.get_torch_device()
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
    management.free_memory(2 * management.module_size(reward), device)  # for the weights, and as much for activations
    try:
        reward.to(device)
        if step >= min(steps, len(sigmas) - 1):  # of some schedulers there are fewer levels, or more
            return reward.score_latents(prompt, latents).float().cpu()
        states, timestep = convert(latents, sampling, sigmas[step], reward.backbone.noise_process)
        return reward.score_states(prompt, states[:, None], timestep)[:, 0].float().cpu()
    finally:
        reward.to(management.unet_offload_device())


def check_space(reward: RewardModel, model: Any, samples: Tensor) -> None:
    """Raise InputError if the reward takes latents of another VAE, by number of channels or by scale."""
    space = reward.backbone.latent_space
    channels, takes = samples.shape[1], f"reward {reward.source} takes [{space}]; load one of the model's family"
    if channels != space.channels:
        raise InputError(f"latent: {channels} channels, but {takes}")
    one = model.get_model_object("process_latent_in")(torch.ones(1, channels, *[1] * (samples.ndim - 2))).flatten()
    scale = 1 / torch.tensor(space.stds) if space.stds else torch.tensor(space.scaling_factor)
    wanted = (1 - torch.tensor(space.means or space.shift_factor)) * scale
    if space.statistics is None and not torch.allclose(one, wanted, rtol=1e-3, atol=1e-3):
        raise InputError(f"model: latents of 1 are scaled to {one[0]:.4g}, but {takes}")


def convert(latents: Tensor, sampling: Any, sigma: Tensor, process: NoiseProcess) -> tuple[Tensor, Tensor]:
    """Convert scaled latents ``(N, C, ...)`` that hold noise to states of the reward's process, at a timestep ``(1,)``.

    ComfyUI's ``noise_scaling`` makes a·x_0 + s·ε: a, s = 1, σ for EPS and v, 1 − σ, σ for CONST. Without noise it
    undoes what ``inverse_noise_scaling`` did at the end of the sampler before; the next sampler begins in the same way.
    The reward's state has the same signal-to-noise ratio, with a + s = 1 in flow matching and a² + s² = 1 in DDPM.
    """
    from latentreward.diffusion import FlowMatching

    zero, one = torch.zeros(()), torch.ones(())
    signal, spread = (sampling.noise_scaling(sigma, noise, clean) for noise, clean in ((zero, one), (one, zero)))
    norm = signal + spread if (flow := isinstance(process, FlowMatching)) else (signal**2 + spread**2).sqrt()
    level = (spread / norm)[None]
    states = sampling.noise_scaling(sigma, torch.zeros_like(latents), latents) / norm
    return states, 1000 * level if flow else process.timesteps_at(level)


def table(scores: Tensor, kept: Container[int] = ()) -> str:
    """Write a line for each score, with a mark at the rows that are ``kept``."""
    return "\n".join(f"{row}: {score:.4f}{' kept' * (row in kept)}" for row, score in enumerate(scores.tolist()))


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (LatentRewardLoad, LatentRewardScore, LatentRewardKeepBest)}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LatentRewardLoad": "Load latent reward",
    "LatentRewardScore": "Score latents at a step",
    "LatentRewardKeepBest": "Keep the best latents",
}
