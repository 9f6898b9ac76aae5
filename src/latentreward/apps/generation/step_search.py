"""Step-wise search inside a diffusers pipeline: draw several next states at each step, and go on from the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentreward.alignment import AdapterSwitch, Policy, Reward, Transition
from latentreward.alignment.rollout.samplers import inside_window
from latentreward.apps.generation.search import Candidates
from latentreward.core.contracts import NoisyStates
from latentreward.core.errors import InputError, check_range
from latentreward.core.running import pair_generator
from latentreward.diffusion import find_family
from latentreward.diffusion.noise.processes import ancestral_variance

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


class LoadedPipeline:
    """Configs of a diffusers pipeline in memory, as a :class:`~latentreward.diffusion.PipelineConfigs`."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._pipeline = pipeline
        self.source = self.named = type(pipeline).__name__
        self.index: dict[str, Any] = {"_class_name": self.source, **pipeline.config}

    def has(self, part: str) -> bool:
        """Tell whether the pipeline has a part."""
        return getattr(self._pipeline, part, None) is not None

    def config(self, part: str) -> dict[str, Any]:
        """Return the config of a part."""
        if not self.has(part):
            raise InputError(f"this {self.source} has no {part}; give a whole text-to-image pipeline")
        loaded = getattr(self._pipeline, part)
        return {"_class_name": type(loaded).__name__, **loaded.config}

    def tensors(self, part: str, names: Sequence[str]) -> list[Tensor]:
        """Return tensors of a part by name."""
        state = getattr(self._pipeline, part).state_dict()
        return [state[name].detach().cpu() for name in names]


def policy_of(pipeline: DiffusionPipeline, family: str | None = None) -> Policy:
    """Wrap a pipeline as a policy without text encoder, so that rewards can score its sampling states.

    Network and VAE are shared with the pipeline, and the pipeline's active LoRAs stay active.

    Args:
        pipeline: The pipeline.
        family: Import path of a family of one's own; None finds the family among those of this package.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = find_family(LoadedPipeline(pipeline), family)
    network = getattr(pipeline, found.part)
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    policy = Policy(network, found, vae=found.wrap_vae(pipeline.vae))
    if active:
        policy.adapters = AdapterSwitch(network, active)
    policy.source = type(pipeline).__name__
    return policy


@dataclass(frozen=True)
class Levels:
    """Noise levels before and after a step of a scheduler, whose states are ``signal·x_0 + noise·ε``."""

    timestep: float  # timestep given to the network in this step
    signal: float  # a before the step
    noise: float  # s before the step
    next_timestep: float  # timestep of the state after the step; 0 after the last step
    next_signal: float  # a' after the step
    next_noise: float  # s' after the step
    next_scale: float = 1.0  # factor of the next state on its way into the network (``scale_model_input`` of diffusers)

    def ancestral(self, latents: Tensor, next_latents: Tensor, eta: float) -> Transition:
        """Return the distribution of the next state under the stochastic step with the same marginals.

        The network's prediction is recovered from the states ``(B, C, ...)`` before and after a first-order
        deterministic step: x = a x̂_0 + s ε̂ and x' = a' x̂_0 + s' ε̂ are two equations for x̂_0 and ε̂. The noise has
        the variance of :func:`~latentreward.diffusion.noise.processes.ancestral_variance` for ``eta`` in [0, 1].
        """
        determinant = self.signal * self.next_noise - self.next_signal * self.noise
        level, following = (self.signal**2, self.noise**2), (self.next_signal**2, self.next_noise**2)
        std = ancestral_variance(level, following, eta) ** 0.5
        kept = (self.next_noise**2 - std**2) ** 0.5
        of_state = self.next_signal * (self.next_noise - kept) / determinant
        of_next = (self.signal * kept - self.next_signal * self.noise) / determinant
        mean = of_state * latents.float() + of_next * next_latents.float()
        spread = torch.full((len(latents),), std, device=latents.device)
        return Transition(mean, spread, spread)


def levels_of(scheduler: SchedulerMixin, timestep: float) -> Levels:
    """Return the noise levels before and after the step that ``scheduler`` has just taken from ``timestep``."""
    family, config = type(scheduler).__name__, scheduler.config
    if config.get("clip_sample") or config.get("thresholding") or config.get("stochastic_sampling"):
        raise InputError(f"step search needs a {family} with clip_sample, thresholding and stochastic_sampling off")
    if family == "DDIMScheduler":
        after = int(timestep) - config.num_train_timesteps // scheduler.num_inference_steps
        alpha_bar = float(scheduler.alphas_cumprod[int(timestep)])
        next_alpha_bar = float(scheduler.alphas_cumprod[after] if after >= 0 else scheduler.final_alpha_cumprod)
        levels = (alpha_bar**0.5, (1 - alpha_bar) ** 0.5)
        return Levels(timestep, *levels, max(after, 0), next_alpha_bar**0.5, (1 - next_alpha_bar) ** 0.5)
    if family not in ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"):
        raise InputError(
            f"step search reads the prediction off deterministic first-order steps, which {family} does not take; use "
            "DDIMScheduler, EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler (from_config)"
        )
    index = scheduler.step_index  # the scheduler has already advanced to the next step
    sigma, next_sigma = (float(value) for value in scheduler.sigmas[index - 1 : index + 1])
    next_timestep = float(scheduler.timesteps[index]) if index < len(scheduler.timesteps) else 0.0
    if family == "FlowMatchEulerDiscreteScheduler":
        return Levels(timestep, 1 - sigma, sigma, next_timestep, 1 - next_sigma, next_sigma)
    return Levels(timestep, 1.0, sigma, next_timestep, 1.0, next_sigma, next_scale=(1 + next_sigma**2) ** -0.5)


class StepSearch:
    """A ``callback_on_step_end`` of a diffusers pipeline that keeps the best of K candidates at each step of a window.

    The pipeline's scheduler takes a deterministic step (leave the pipeline's own ``eta`` at 0). Within the window the
    callback recovers the network's prediction from this step, draws K candidates from the stochastic step with the same
    marginals (:meth:`Levels.ancestral`), scores the candidates, and gives the best one back to the pipeline. The last
    step, which leads to clean latents, and steps outside the window stay deterministic. ::

        policy = policy_of(pipeline)
        reward = LatentReward("reward.ckpt").load(policy)
        latents = torch.randn(len(prompts), *policy.latent_shape())
        search = StepSearch(policy, reward, prompts, latents, num_candidates=8)
        images = pipeline(prompts, latents=latents, callback_on_step_end=search).images

    Args:
        policy: The pipeline, wrapped by :func:`~latentreward.apps.generation.policy_of`.
        reward: Reward of noisy latents.
        prompts: One prompt per image.
        latents: Initial latents that the pipeline gets too; without them the first step is not searched.
        eta: Scale η of the noise of a searched step, in (0, 1], as in DDIM; 1 is ancestral sampling, the posterior of
            the forward process.
        seed: Seed of all candidates. They depend on the seed, the index of the image in ``prompts`` and its prompt.
        options: Fields of :class:`~latentreward.apps.generation.search.Candidates`.

    Attributes:
        scores: One ``(K, B)`` tensor per searched step of the last run, on the CPU.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        prompts: Sequence[str],
        latents: Tensor | None = None,
        eta: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_range("(0, 1]", "at 0 all candidates are the same", eta=eta)
        if not policy.family.plain_states or reward.needs_clean:
            what = "scores finished pictures" if policy.family.plain_states else f"{policy.family.title}'s pipeline"
            raise InputError(f"StepSearch cannot read this: {what}; use `latentreward generate` with a reward")
        self.reward, self.prompts, self.latents = reward, tuple(prompts), latents
        self.candidates, self.eta, self.seed = Candidates(**options), eta, seed
        self.scores: list[Tensor] = []
        with torch.no_grad():
            self._encoded = reward.encode_prompts(self.prompts)
        self._before: Tensor | None = None  # states after the step before this one

    @torch.no_grad()
    def __call__(
        self, pipeline: DiffusionPipeline, step_index: int, timestep: Tensor, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Replace the states after a step, ``callback_kwargs["latents"]``, by the best candidates."""
        latents, before = callback_kwargs["latents"], self._before
        if len(latents) != len(self.prompts):
            raise InputError(f"the pipeline makes {len(latents)} images; the search got {len(self.prompts)} prompts")
        if step_index == 0:
            scale = float(getattr(pipeline.scheduler, "init_noise_sigma", 1.0))
            self.scores, before = [], None if self.latents is None else self.latents.to(latents) * scale
        levels = levels_of(pipeline.scheduler, float(timestep))
        inside = inside_window(levels.timestep, self.candidates.low, self.candidates.high) and levels.next_noise > 0
        if inside and before is not None:
            count, shape, name = self.candidates.num_candidates, latents.shape[1:], f"step_search/{levels.timestep:g}"
            generators = (pair_generator(self.seed, name, 0, f"{n}/{one}") for n, one in enumerate(self.prompts))
            drawn = torch.stack([torch.randn((count, *shape), generator=one) for one in generators], dim=1)
            candidates = levels.ancestral(before, latents, self.eta).sample(drawn.to(latents.device)).to(latents.dtype)
            states = (candidates.float() * levels.next_scale).flatten(0, 1)
            scored_at = levels.timestep if self.candidates.score_at == "step" else levels.next_timestep
            images = torch.arange(len(latents), device=latents.device)
            timesteps = torch.full((len(states),), scored_at, device=latents.device)
            noisy = NoisyStates(states, timesteps, images.repeat(count), None)
            scores = self.reward(noisy, self._encoded).view(count, -1)
            self.scores.append(scores.cpu())
            latents = candidates[scores.argmax(dim=0), images]
        self._before = latents
        return {"latents": latents}
