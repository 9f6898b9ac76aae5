"""Reward feedback learning (ReFL, arXiv:2304.05977): the gradient of a reward, through the last steps of sampling."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentreward.contracts import PreferenceBatch, PromptBatch
from latentreward.errors import InputError
from latentreward.losses import RewardLoss, denoising_error, prediction_drift
from latentreward.modules.alignment import RewardedModule, evaluating
from latentreward.modules.images import latents_of
from latentreward.modules.pair_noise import PairDraws
from latentreward.noise import TimestepGrid
from latentreward.policies import PolicySource
from latentreward.policies.surrogate_gradient import gradient_carrier, surrogate
from latentreward.rewards import RewardSource
from latentreward.rollout import Sampling, check_sigmas, score_finished
from latentreward.rollout.prompted import PromptedPolicy
from latentreward.rollout.rollout_noise import RolloutDraws
from latentreward.seeding import pair_generator


class LateSample(NamedTuple):
    """Where a sampler was stopped.

    Attributes:
        clean: ``(B, C, ...)`` float32: the finished latents as predicted there, with the policy's graph.
        drift: ``(B,)`` mean squared difference from the reference's predictions in the steps with a graph; None if it
            was not asked for.
        step: Number of the step.
    """

    clean: Tensor
    drift: Tensor | None
    step: int


class ReFLModule(RewardedModule):
    r"""ReFL in latents: no VAE in the graph, and a graph of the last steps only.

    For each batch of prompts the sampler is stopped at a random late step; what it predicts there for the finished
    latents is scored, and the gradient goes back through ``gradient_steps`` steps. A latent reward scores them at noise
    levels of its own (``reward_sigmas``): one, or several for DiNa-LRM's ensemble (arXiv:2602.11146). A reward that
    scores pixels decodes them, with gradient; in a mixture of rewards it is the pixel-space term.

    The reward is differentiated at once and the policy afterwards, so that the reward's activations are gone by then,
    and so that a reward may be an adapter of the policy's own network under gradient checkpointing.

    Rewards that are maximised this directly are exploited soon: use a term that keeps the policy in place, and the
    callback ``HackingMonitor``.

    Args:
        policy: The generator.
        reward: Differentiable.
        sampling: Steps and noise of the sampler. ReFL: 40 steps of DDPM (``eta: 1``).
        stop_range: The sampler is stopped when so many steps are left, drawn uniformly from [low, high] for each batch,
            on all ranks alike. ReFL: [1, 10] of 40. [1, 1] finishes the samples, as DRaFT (arXiv:2309.17400) does.
        gradient_steps: Steps that the gradient passes, the one stopped at included: 1 in ReFL, K in DRaFT-K. Memory
            grows with it.
        reward_sigmas: Noise levels at which a latent reward scores; without effect on rewards of pixels.
        loss: What becomes of the reward.
        kl_weight: Weight of the mean squared difference of the predictions of policy and reference, in the steps with a
            graph. Each costs a pass of the reference, and each after the first also a backward pass with respect to its
            input, whose activations are freed before the next step.
        pretraining_weight: Weight of the denoising error on images, which the batches must then hold: see
            :class:`~latentreward.data.PromptsAndImages`. The chosen images of its pairs are taken.
        options: See :class:`AlignmentModule`. ReFL's released code samples without guidance.

    Raises:
        InputError: If an argument is out of range, or the reward has no gradient.

    Note:
        ReFL's released code gives the network the step's number (30 to 39) as its timestep; here it gets the step's
        timestep. Its pre-training term, in the paper, is not in the released code.
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
        kl_weight: float = 0.0,
        pretraining_weight: float = 0.0,
        **options: Any,
    ) -> None:
        sampling = (sampling or Sampling(num_inference_steps=40)).with_noise()
        low, high = stop_range
        if not 1 <= low <= high <= sampling.num_inference_steps:
            raise InputError(
                f"stop_range={list(stop_range)} must satisfy 1 <= low <= high <= num_inference_steps, which is "
                f"{sampling.num_inference_steps}; it counts the steps that are left"
            )
        if not 1 <= gradient_steps <= sampling.num_inference_steps:
            raise InputError(f"gradient_steps={gradient_steps} must lie in 1..{sampling.num_inference_steps}")
        check_sigmas(reward_sigmas)
        for name, weight in (("kl_weight", kl_weight), ("pretraining_weight", pretraining_weight)):
            if not 0.0 <= weight < float("inf"):
                raise InputError(f"{name}={weight:g} must be at least 0 and finite; 0 leaves the term out")
        sampler = sampling.sampler(policy.pipeline().config("scheduler"))
        super().__init__(policy, reward, **options)
        if not self.reward.differentiable:
            raise InputError(
                f"{type(self.reward).__name__} gives no gradient, which ReFL needs; take a reward that does, or a "
                "method that only ranks samples (LPO, SPO, GRPO)"
            )
        self.sampling, self.sampler = sampling, sampler
        self.stop_range, self.gradient_steps, self.reward_sigmas = (low, high), gradient_steps, tuple(reward_sigmas)
        self.loss = loss or RewardLoss()
        self.kl_weight, self.pretraining_weight = kl_weight, pretraining_weight
        self.levels = TimestepGrid(0, 999, 1)

    def setup(self, stage: str) -> None:
        """Also refuse float16, in which the gradients inside the reward, unscaled, would be lost."""
        super().setup(stage)
        if self.trainer.precision == "16-mixed":
            raise InputError("trainer.precision=16-mixed: the reward's gradients vanish in float16; use bf16-mixed")

    def stop_index(self, batch_idx: int) -> int:
        """Number of the step at which the sampler is stopped, the same on all ranks."""
        low, high = self.stop_range
        generator = pair_generator(self.seed, "stop", self.current_epoch, str(batch_idx))
        return len(self.sampler) - int(torch.randint(low, high + 1, (), generator=generator))

    def sample(self, prompts: PromptBatch, stop: int) -> LateSample:
        """Sample up to step ``stop``, the last ``gradient_steps`` steps with a graph."""
        network = PromptedPolicy.of(self.policy, prompts, self.guidance_scale)
        draws = RolloutDraws(self.seed, prompts.keys)
        shape = self.policy.latent_shape(self.sampling.height, self.sampling.width)
        latents = draws.initial(shape).to(self.device)
        first = max(0, stop + 1 - self.gradient_steps)
        with torch.no_grad(), evaluating(self.policy.network):
            for index in range(first):
                latents = self._step(latents, network(latents, self._timestep(index)), index, draws)
        drifts = []
        for index in range(first, stop + 1):
            timestep = self._timestep(index)
            output = network(latents, timestep)
            if self.kl_weight:
                drifts.append(self._drift(network, latents, timestep, output))
            if index < stop:
                latents = self._step(latents, output, index, draws)
        timesteps = torch.full((len(prompts),), timestep)
        clean = self.sampler.clean(latents, output, timesteps)
        return LateSample(clean, torch.stack(drifts).mean(dim=0) if drifts else None, stop)

    def _drift(self, network: PromptedPolicy, latents: Tensor, timestep: float, output: Tensor) -> Tensor:
        """Mean squared difference ``(B,)`` of the policy's ``output`` from the reference's, with its whole gradient.

        From the second step with a graph on, ``latents`` depend on the policy, and so does what the reference makes of
        them. The reference is differentiated here and now with respect to its input: its activations are freed before
        the next step, and gradient checkpointing recomputes its blocks while no adapter is at work.
        """
        if not latents.requires_grad:
            with torch.no_grad(), self.policy.reference():
                reference = network(latents, timestep)
            return prediction_drift(output, reference)
        leaf = latents.detach().requires_grad_()
        with self.policy.reference():
            reference = network(leaf, timestep)
            (slope,) = torch.autograd.grad(prediction_drift(output.detach(), reference).sum(), leaf)
        return prediction_drift(output, reference.detach()) + gradient_carrier(latents, slope)

    def _timestep(self, index: int) -> float:
        return self.sampler.timesteps[index].item()

    def _step(self, latents: Tensor, output: Tensor, index: int, draws: RolloutDraws) -> Tensor:
        timesteps = torch.full((len(latents),), self._timestep(index))
        transition = self.sampler.transition(latents, output, timesteps)
        if not self.sampler.noise_std[index]:
            return transition.mean
        return transition.sample(draws.noise(index, 1, latents.shape[1:])[0])

    def reward_term(self, prompts: PromptBatch, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the reward, ready to go back through ``clean``, and the rewards ``(B,)`` themselves."""
        rewards = []

        def loss(latents: Tensor) -> Tensor:
            scores = score_finished(self.reward, latents, prompts, self.seed, self.reward_sigmas)
            rewards.append(scores.detach())
            return self.loss(scores)

        return surrogate(clean, loss), rewards[0]

    def pretraining_term(self, batch: PreferenceBatch) -> Tensor:
        """Denoising error of the policy on the chosen images, at uniform timesteps."""
        draws = PairDraws(batch, self.seed, self.current_epoch)
        latents = latents_of(self.policy, batch, draws, "sample", ("chosen",))
        process, count = self.policy.noise_process, len(batch)
        noise = draws.normal("noise", latents.shape[1:], per_image=False)[:count].to(latents.device)
        timesteps = draws.timesteps(self.levels, process, per_image=False)[:count].to(latents.device)
        conditioning = self.policy.encode_prompts(batch.prompts) if batch.conditioning is None else batch.conditioning
        output = self.policy.predict(process.add_noise(latents, noise, timesteps), timesteps, conditioning)
        return denoising_error(output, process.target(latents, noise, timesteps)).mean()

    def training_step(self, batch: PromptBatch | Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch of prompts, or of ``{"prompts": ..., "images": ...}`` with the pre-training term.

        Raises:
            InputError: If that term has a weight and the batch no images.
        """
        prompts, images = (batch, None) if isinstance(batch, PromptBatch) else (batch["prompts"], batch["images"])
        sample, size = self.sample(prompts, self.stop_index(batch_idx)), len(prompts)
        loss, rewards = self.reward_term(prompts, sample.clean)
        self.log("train/reward", rewards.mean(), prog_bar=True, batch_size=size)
        self.log("train/stop_step", float(sample.step), batch_size=size)
        if sample.drift is not None:
            drift = sample.drift.mean()
            self.log("train/drift", drift, batch_size=size)
            loss = loss + self.kl_weight * drift
        if self.pretraining_weight:
            if images is None:
                raise InputError(
                    f"pretraining_weight={self.pretraining_weight:g} needs images beside the prompts; train with "
                    "data: PromptsAndImages, or set it to 0"
                )
            error = self.pretraining_term(images)
            self.log("train/denoising_error", error, batch_size=len(images))
            loss = loss + self.pretraining_weight * error
        self.log("train/loss", loss, batch_size=size)
        return loss
