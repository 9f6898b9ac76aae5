r"""Reward feedback learning (ReFL, arXiv:2304.05977): train a policy by the reward's gradient through a few steps.

.. math:: L = \lambda\,\mathbb E\,\varphi(r) + w_{\mathrm{pre}} L_{\mathrm{pre}} + w_{\mathrm{KL}}
    \lVert f_\theta - f_{\mathrm{ref}}\rVert^2

The terms are :class:`RewardLoss`, the denoising error of images, and the same of policy and reference: up to a factor
of the noise level, the KL divergence between their steps, two Gaussians of equal spread.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

from latentreward.alignment.losses.dpo import denoising_error
from latentreward.alignment.modules.alignment import AlignmentModule
from latentreward.alignment.policies.loading import PolicySource
from latentreward.alignment.rewards.base import RewardSource, check_sigmas, score_finished, score_states
from latentreward.alignment.rewards.latent import gradient_carrier, surrogate
from latentreward.alignment.rollout.reward_guidance import refuse_float16, require_gradient
from latentreward.alignment.rollout.samplers import Sampling
from latentreward.alignment.rollout.trajectories import PromptedPolicy, RolloutDraws
from latentreward.core.contracts import PreferenceBatch, PromptBatch
from latentreward.core.errors import InputError, check_choices, check_range
from latentreward.core.promises import detached, returns, wrong_tensor
from latentreward.core.running import evaluating, pair_generator, phase
from latentreward.diffusion import TimestepGrid
from latentreward.reward.losses.base import SetLoss
from latentreward.reward.modules.reward import PairDraws, latents_of


class RewardLoss(SetLoss):
    r"""Loss of a reward r, λ·φ(r).

    ReFL's released code has c = 2 and λ = 1e-3, for ImageReward's scores, which have unit variance. PRFL's has
    ``sigmoid``, c = 2 and λ = 0.1: the ceiling is never reached, and the gradient fades for high and for low rewards.

    Args:
        scale: λ, positive.
        ceiling: None gives φ(r) = −r, as in DRaFT. A number c, in reward units, gives φ(r) = max(0, c − r), as in
            ReFL's released code: samples that score above c then have no gradient.
        sigmoid: Whether to replace r by its logistic function σ(r) in (0, 1); ``ceiling`` is then compared with σ(r).
    """

    def __init__(self, scale: float = 1.0, ceiling: float | None = None, sigmoid: bool = False) -> None:
        super().__init__()
        check_range("(0, inf)", scale=scale)
        if ceiling is not None and not math.isfinite(ceiling):
            raise InputError(f"ceiling = {ceiling} must be finite; null sets no ceiling")
        self.scale, self.ceiling, self.sigmoid = scale, ceiling, sigmoid

    @returns(lambda found, loss, rewards: wrong_tensor(found, ()) or detached(found, rewards))
    def forward(self, rewards: Tensor) -> Tensor:
        """Compute the mean loss of rewards ``(B,)``: a scalar, float32."""
        rewards = rewards.float().sigmoid() if self.sigmoid else rewards.float()
        loss = -rewards if self.ceiling is None else relu(self.ceiling - rewards)
        return self.scale * loss.mean()


class ReFLModule(AlignmentModule):
    """ReFL for latents: the graph covers the last sampling steps only, and a latent reward needs no VAE.

    For each batch of prompts the sampler stops at a random late step. The reward scores the finished latents that are
    predicted at that step, and the gradient flows back through ``gradient_steps`` steps. A latent reward noises the
    latents to ``reward_sigmas`` first; a reward of pixels decodes them, with gradient.

    The backward pass goes first through the reward, then through the policy. A reward may therefore be a second adapter
    on the policy's network: no checkpointed block is recomputed while the wrong adapter is active. A reward that is
    maximised this directly is soon exploited: use ``kl_weight`` or ``pretraining_weight``, and ``HackingMonitor``.

    Args:
        sampling: Steps and noise of the sampler. ReFL: 40 steps of DDPM (``eta: 1``).
        stop_range: Range [low, high] of the number of steps that are left when the sampler stops, sampled uniformly for
            each batch, equal on all ranks. ReFL: [1, 10] of 40. [1, 1] finishes the samples, as DRaFT
            (arXiv:2309.17400) does. PRFL: [2, 40] of 40.
        gradient_steps: Number of steps that the gradient passes, the last one included: 1 in ReFL, K in DRaFT-K.
            Memory grows with the number.
        reward_sigmas: Noise levels at which a latent reward scores; without effect on rewards of pixels, and with
            ``scored: state``.
        loss: Loss as a function of the reward.
        kl_weight: Weight of the mean squared difference between the predictions of policy and reference, in the
            last ``gradient_steps`` steps; 0 as in the papers. 4 suits rewards whose scores of a prompt have a standard
            deviation of 0.1 to 0.35; scale it with that. Each of these steps costs a forward pass of the reference,
            from the second on a backward pass too, because its input depends on the policy.
        pretraining_weight: Weight of the denoising error on images. Above 0, batches must hold images (see
            :class:`~latentreward.data.PromptsAndImages`); the chosen images of the pairs are used.
        scored: ``clean``: predicted finished latents (ReFL). ``state``: the state after the last step with a graph, at
            its own noise level (PRFL), so that any step can be learned from; ``guidance_scale`` None then means none.
        alternate_pretraining: Whether the denoising error has optimiser steps of its own, the second, fourth and so on
            (PRFL), instead of being added to the reward's loss.
        options: See :class:`AlignmentModule`. ReFL's released code samples without guidance.

    Note:
        ReFL's released code gives the network the step's index (30 to 39) as its timestep; here the network gets the
        step's timestep. PRFL's released code takes steps of UniPC, here they are those of ``sampling``.
    """

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource,
        sampling: Sampling | None = None,
        stop_range: tuple[int, int] = (1, 10),
        gradient_steps: int = 1,
        reward_sigmas: Sequence[float] = (0.4,),
        loss: RewardLoss | None = None,
        kl_weight: float = 4.0,
        pretraining_weight: float = 0.0,
        scored: Literal["clean", "state"] = "clean",
        alternate_pretraining: bool = False,
        **options: Any,
    ) -> None:
        check_choices(ReFLModule, scored=scored)
        sampling = (sampling or Sampling(num_inference_steps=40)).with_noise()
        low, high = stop_range
        if not 1 <= low <= high <= sampling.num_inference_steps:
            steps = sampling.num_inference_steps
            raise InputError(f"stop_range={list(stop_range)} counts steps that are left: 1 <= low <= high <= {steps}")
        check_range(f"[1, {sampling.num_inference_steps}]", gradient_steps=gradient_steps)
        check_sigmas(reward_sigmas)
        weights = {"kl_weight": kl_weight, "pretraining_weight": pretraining_weight}
        check_range("[0, inf)", "0 leaves the term out", **weights)
        if alternate_pretraining and not pretraining_weight:
            raise InputError("alternate_pretraining=true alternates with a term of weight 0; raise pretraining_weight")
        family = policy.resolve_family()
        if scored == "state":
            reward.require_step_scores("scored=state")
            if low < 2:
                raise InputError(f"stop_range={list(stop_range)}: scored=state takes noisy states; start at 2")
            if options.get("guidance_scale") is None:
                options["guidance_scale"] = family.unguided
        sampler = sampling.sampler(family)
        reward.require_gradient(type(self).__name__)
        reward.require_alone(f"{type(self).__name__} has one sample a prompt")
        super().__init__(policy, reward, **options)
        require_gradient(self.reward, type(self).__name__)
        self.sampling, self.sampler = sampling, sampler
        self.stop_range, self.gradient_steps, self.reward_sigmas = (low, high), gradient_steps, tuple(reward_sigmas)
        self.loss = loss or RewardLoss()
        self.kl_weight, self.pretraining_weight = kl_weight, pretraining_weight
        self.scored, self.alternate_pretraining = scored, alternate_pretraining
        self.levels = TimestepGrid(0, 999, 1)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        refuse_float16(self.trainer.precision)

    def stop_index(self, batch_idx: int) -> int:
        """Return the index of the step at which the sampler stops, equal on all ranks."""
        low, high = self.stop_range
        # Equal on all ranks: under FSDP2 they call the network equally often.
        generator = pair_generator(self.seed, "stop", self.current_epoch, str(batch_idx))
        return len(self.sampler) - int(torch.randint(low, high + 1, (), generator=generator))

    def sample(self, prompts: PromptBatch, stop: int) -> tuple[Tensor, float | None, Tensor | None]:
        """Sample up to the step of index ``stop``, the last ``gradient_steps`` steps with a graph.

        Returns:
            Latents ``(B, C, ...)``, float32, that the reward scores: finished ones as predicted at that step, or the
            states after it; the timestep of these states, None for finished latents; and the mean squared difference
            ``(B,)`` between the predictions of policy and reference in the steps with a graph, None without
            ``kl_weight``.
        """
        network = PromptedPolicy.of(self.policy, prompts, self.guidance_scale)
        draws = RolloutDraws(self.seed, prompts.keys)
        shape = self.sampling.latent_shape(self.policy.family)
        latents, timesteps = draws.initial(shape).to(self.device), self.sampler.timesteps.tolist()
        # DRaFT-K with K above the stopping step differentiates every step that there is.
        first = max(0, stop + 1 - self.gradient_steps)
        # As in rollouts, the adapter's dropout is off where nothing is learned.
        with phase("rollout"), torch.no_grad(), evaluating(self.policy.network):
            for index in range(first):
                latents = self._step(latents, network(latents, timesteps[index]), index, draws)
        drifts = []
        for index in range(first, stop + 1):
            timestep = timesteps[index]
            output = network(latents, timestep)
            if self.kl_weight:
                drifts.append(self._drift(network, latents, timestep, output))
            if index < stop or self.scored == "state":
                latents = self._step(latents, output, index, draws)
        scored_at = self.sampler.next_timestep(stop) if self.scored == "state" else None
        if scored_at is None:
            latents = self.sampler.clean(latents, output, torch.full((len(prompts),), timestep))
        return latents, scored_at, torch.stack(drifts).mean(dim=0) if drifts else None

    def _drift(self, network: PromptedPolicy, latents: Tensor, timestep: float, output: Tensor) -> Tensor:
        """Return the mean squared difference ``(B,)`` of the policy's output from the reference's, with gradient."""
        if not latents.requires_grad:
            with torch.no_grad(), self.policy.reference():
                reference = network(latents, timestep)
            return denoising_error(output, reference)
        # From the second step on the reference's input depends on the policy. It is differentiated here, so that its
        # activations are freed, and gradient checkpointing recomputes its blocks while the adapter is still off.
        leaf = latents.detach().requires_grad_()
        with self.policy.reference():
            reference = network(leaf, timestep)
            (slope,) = torch.autograd.grad(denoising_error(output.detach(), reference).sum(), leaf)
        return denoising_error(output, reference.detach()) + gradient_carrier(latents, slope)

    def _step(self, latents: Tensor, output: Tensor, index: int, draws: RolloutDraws) -> Tensor:
        timesteps = self.sampler.timesteps[index].expand(len(latents))
        transition = self.sampler.transition(latents, output, timesteps)
        if not self.sampler.noise_std[index]:
            return transition.mean
        return transition.sample(draws.noise(index, 1, latents.shape[1:])[0])

    @phase("reward")
    def reward_term(
        self, prompts: PromptBatch, latents: Tensor, timestep: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the reward's loss, with a gradient to ``latents`` ``(B, C, ...)``, and the rewards ``(B,)``, detached.

        ``timestep`` None stands for finished latents, which a latent reward noises itself.
        """
        rewards = []

        def loss(latents: Tensor) -> Tensor:
            if timestep is None:
                scores = score_finished(self.reward, latents, prompts, self.seed, self.reward_sigmas)
            else:
                with torch.no_grad():
                    encoded = self.reward.encode_prompts(prompts.prompts)
                scores = score_states(self.reward, encoded, latents, torch.arange(len(prompts)), timestep)
            rewards.append(scores.detach())
            return self.loss(scores)

        return surrogate(latents, loss), rewards[0]

    def pretraining_term(self, batch: PreferenceBatch) -> Tensor:
        """Return the policy's mean denoising error on the chosen images, at uniform random timesteps."""
        draws = PairDraws(batch, self.seed, self.current_epoch)
        latents = latents_of(self.policy, batch, draws, "sample", ("chosen",))
        process, count = self.policy.noise_process, len(batch)
        noise = draws.normal("noise", latents.shape[1:], per_image=False)[:count].to(latents.device)
        timesteps = draws.timesteps(self.levels, process, per_image=False)[:count].to(latents.device)
        conditioning = self.policy.conditioning_of(batch)
        noisy = process.add_noise(latents, noise, timesteps)
        output = self.policy.predict(noisy, timesteps, conditioning, self.guidance_scale)
        return denoising_error(output, process.target(latents, noise, timesteps)).mean()

    def training_step(self, batch: PromptBatch | Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of a batch: prompts, or ``{"prompts": ..., "images": ...}`` for the pre-training term."""
        prompts, images = (batch, None) if isinstance(batch, PromptBatch) else (batch["prompts"], batch["images"])
        if self.alternate_pretraining and self.global_step % 2:
            loss = self._weighted_pretraining(images)
            self.log("train/loss", loss, batch_size=len(prompts))
            return loss
        stop, size = self.stop_index(batch_idx), len(prompts)
        latents, timestep, drifts = self.sample(prompts, stop)
        loss, rewards = self.reward_term(prompts, latents, timestep)
        self.log("train/reward", rewards.mean(), prog_bar=True, batch_size=size)
        self.log("train/stop_step", float(stop), batch_size=size)
        if drifts is not None:
            drift = drifts.mean()
            self.log("train/drift", drift, batch_size=size)
            loss = loss + self.kl_weight * drift
        if self.pretraining_weight and not self.alternate_pretraining:
            loss = loss + self._weighted_pretraining(images)
        self.log("train/loss", loss, batch_size=size)
        return loss

    def _weighted_pretraining(self, images: PreferenceBatch | None) -> Tensor:
        if images is None:
            raise InputError("pretraining_weight needs images beside the prompts; take data: PromptsAndImages")
        error = self.pretraining_term(images)
        self.log("train/denoising_error", error, batch_size=len(images))
        return self.pretraining_weight * error
