"""Reinforcement learning on the forward process: finished samples are noised again, and the network learns from them.

Neither the sampler's noise nor its log-probabilities take part, so that any deterministic sampler serves, and training
needs no states of the rollout but the finished latents (DiffusionNFT, arXiv:2509.16117; AWM, arXiv:2509.25050; RAM,
arXiv:2605.10759; DGPO, arXiv:2510.08425; CRD, arXiv:2603.14128).
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from latentreward.alignment.losses.matching import MatchingLoss, velocity_divergence
from latentreward.alignment.losses.nft import NFTLoss
from latentreward.alignment.losses.trust_region import Penalty, TrustRegion
from latentreward.alignment.modules.alignment import AlignmentModule
from latentreward.alignment.modules.grpo import LEAST_ADVANTAGE, group_statistics
from latentreward.alignment.policies.loading import PolicySource
from latentreward.alignment.policies.moving_average import AVERAGE, OLD, DecayRamp, MovingCopy
from latentreward.alignment.rewards.base import RewardSource, begin_finished, check_sigmas, rows_of
from latentreward.alignment.rollout.advantages import Advantage, GroupAdvantage
from latentreward.alignment.rollout.pruning import FinishedSamples, Pruning
from latentreward.alignment.rollout.samplers import Sampling
from latentreward.alignment.rollout.step_choice import RandomSteps, StepChoice, StratifiedSteps
from latentreward.core.contracts import PromptBatch, RenoisedGroups, RenoisedSamples, SampledStates, join_rows
from latentreward.core.errors import InputError, check_at_least_one, check_range
from latentreward.core.running import pair_generator

FOLLOWED = "copies_followed"
"""Key of a checkpoint with the optimiser step after which the copies last followed the policy."""


class Renoised(NamedTuple):
    """Noisy states of a batch, and what the network should predict for them."""

    latents: Tensor  # ``(B, C, ...)`` x_σ
    target: Tensor  # ``(B, C, ...)`` what the network should predict: ε − x₀ of a flow
    sigmas: Tensor  # ``(B,)`` σ


class ForwardProcessModule(AlignmentModule):
    """Base of the modules that learn from finished samples, with a copy of the adapter that samples.

    Args:
        copies: How each copy of the adapter follows the policy, by name.
        sampling: Sampler settings of rollouts, without noise; None takes the method's number of steps: AWM 14, the
            others 10.
        steps: Choice of the sampler's noise levels to train at; each one is a row of a batch. None takes the method's.
        num_samples: Samples K per prompt.
        reward_sigmas: Noise levels at which a latent reward scores; without effect on rewards of pixels.
        advantage: Rule that turns rewards into advantages; None divides by the spread of all rewards of a rollout.
        trust_region: A :class:`~latentreward.alignment.Penalty`, or None. The other rules need a sampler's steps.
        prompts_at_once: Prompts of a rollout that are sampled at once, to bound memory; None takes all.
        pruning: How many candidates of a prompt are sampled, of which a latent reward picks those that are finished.
        options: See :class:`~latentreward.alignment.AlignmentModule`. There is no classifier-free guidance.

    Attributes:
        experience: :class:`~latentreward.core.contracts.RenoisedGroups` for a method whose rows hold all samples of a
            prompt, so that no batch, rank or optimiser step has a part of them.
    """

    experience: type[SampledStates] = RenoisedSamples
    flows_only = True  # whether the method needs a flow
    compares = True  # whether samples of a prompt are compared, so that there must be two
    # Whether the gradient is linear in the advantages of compared samples, as pruning needs. DGPO's is but for a weight
    # of each group, a function of products of advantages with errors.
    prunes = True
    usual_sampling: ClassVar = Sampling(10)  # what None stands for
    usual_steps: ClassVar[StepChoice | None] = None  # the same; None for a class with :meth:`trained_timesteps`

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource,
        copies: dict[str, DecayRamp],
        sampling: Sampling | None = None,
        steps: StepChoice | None = None,
        num_samples: int = 24,
        reward_sigmas: Sequence[float] = (0.4,),
        advantage: Advantage | None = None,
        trust_region: TrustRegion | None = None,
        prompts_at_once: int | None = None,
        pruning: Pruning | None = None,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> None:
        family, sampling, steps = policy.resolve_family(), sampling or self.usual_sampling, steps or self.usual_steps
        if self.flows_only and not family.flow:
            told = f"policy.source={policy.source!r} is {family.title}, no rectified flow"
            raise InputError(f"{told}, which {type(self).__name__} needs; use RAM, LPO or GRPO")
        guidance_scale = family.unguided if guidance_scale is None else guidance_scale
        if family.needs_uncond(family.guidance(guidance_scale)):
            raise InputError(f"guidance_scale={guidance_scale:g}: {type(self).__name__} has no guidance; leave it out")
        noise = "noise_level" if family.flow else "eta"
        if value := getattr(sampling, noise):
            raise InputError(f"sampling.{noise}={value:g}: {type(self).__name__} samples without noise; leave it out")
        if self.compares:
            check_range("[2, inf)", "one leaves nothing to compare", num_samples=num_samples)
        check_at_least_one(prompts_at_once=prompts_at_once)
        check_sigmas(reward_sigmas)
        if pruning is not None:
            if not self.prunes:
                raise InputError(f"pruning: {type(self).__name__} is not linear in advantages; leave it out")
            pruning.check("num_samples", num_samples, sampling.num_inference_steps, reward)
        if advantage is not None and (advantage.takes_parts or advantage.takes_features):
            name = type(advantage).__name__
            raise InputError(f"advantage: {name} is for TrajectoryGRPOModule; take GroupAdvantage")
        if trust_region is not None and not isinstance(trust_region, Penalty):
            name = type(trust_region).__name__
            raise InputError(f"trust_region: {name} needs the steps of a sampler; take a Penalty such as NormGuard")
        if steps is not None:
            steps.choose(sampling.num_inference_steps, torch.Generator())
        # Made before weights are loaded, so that a scheduler that cannot make the steps is refused at once.
        sampler = sampling.sampler(family)
        super().__init__(policy, reward, guidance_scale=guidance_scale, **options)
        self.sampling, self.sampler, self.num_samples, self.steps = sampling, sampler, num_samples, steps
        self.reward_sigmas, self.advantage = tuple(reward_sigmas), advantage or GroupAdvantage("all")
        self.guard, self.prompts_at_once = trust_region, prompts_at_once
        self.rollout = FinishedSamples(num_samples, pruning)
        self.copies = [MovingCopy(self.policy, name, ramp) for name, ramp in copies.items()]
        self.followed = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[FOLLOWED] = self.followed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for copy in self.copies:
            copy.check(checkpoint["state_dict"])
        super().on_load_checkpoint(checkpoint)
        self.followed = checkpoint.get(FOLLOWED, 0)

    def make_experience(self, prompts: PromptBatch) -> SampledStates | None:
        self.move_copies()
        self.rollout.begin()
        sampled, pending = [], []
        for part in prompts.split(self.prompts_at_once):
            with self.policy.adapters.use(OLD):
                sampled.append(self.rollout.sample(self, part, self.sampler, "finished").finished)
            # A reward on a server scores these samples while the next are drawn.
            pending.append(begin_finished(self.reward, sampled[-1], part, self.seed, self.reward_sigmas))
        latents = torch.cat(sampled)
        rewards = self.reward.mix(torch.cat([wait() for wait in pending]), rows_of(prompts, latents))
        rewards = rewards.view(len(prompts), self.num_samples)
        self.rollout.rewards = rewards.cpu()
        self.rollout_statistics = group_statistics(torch.zeros(1), rewards.T[None].cpu())
        advantage = self.rollout.advantages(self, rewards, self.advantage)
        learned = (advantage.abs() > LEAST_ADVANTAGE).any()
        if not self.of_all_ranks(learned[None]).any():  # equal samples count beside others
            return None
        latents, advantage = latents.cpu(), advantage.cpu()
        if self.experience is RenoisedGroups:
            samples = join_rows(self._rows_of(prompts, latents.unflatten(0, advantage.shape), advantage))
        else:
            samples = join_rows(self._rows_of(self.rollout.samples, latents, advantage.flatten()))
        return samples

    def move_copies(self) -> None:
        """Let the copies follow the policy, once after each optimiser step."""
        if self.trainer.global_step != self.followed:  # a rollout that follows an empty one would move them twice
            self.followed = self.trainer.global_step
            for copy in self.copies:
                copy.follow(self.followed)

    def rollout_settings(self) -> dict[str, Any]:
        return {}

    def guarded(self, loss: Tensor, velocity: Tensor, reference: Tensor | None) -> Tensor:
        """Add the penalty of ``trust_region``, if there is one, to a loss, and log it."""
        if self.guard is None or reference is None:
            return loss
        penalty = self.guard.penalty(velocity, reference)
        self.log("train/penalty", penalty.detach(), batch_size=len(velocity))
        return loss + penalty

    def _rows_of(self, prompts: PromptBatch, latents: Tensor, advantage: Tensor) -> list[RenoisedSamples]:
        """Return the rows of each sample, or of each prompt's samples: one for each of their timesteps."""
        records, kind = [], cast("type[RenoisedSamples]", self.experience)
        for row, (prompt, key) in enumerate(zip(prompts.prompts, prompts.keys, strict=True)):
            names, timesteps = self.trained_timesteps(key)
            count = len(timesteps)
            records.append(
                kind(
                    keys=tuple(f"{key}/{name}" for name in names),
                    prompts=(prompt,) * count,
                    latents=latents[row].expand(count, *latents.shape[1:]),
                    timesteps=timesteps,
                    advantage=advantage[row].expand(count, *advantage.shape[1:]),
                )
            )
        return records

    def trained_timesteps(self, key: str) -> tuple[Sequence[int], Tensor]:
        """Return the timesteps ``(n,)`` to train ``key`` at, a sample or a prompt, and a distinct number for each."""
        assert self.steps is not None, "a class without steps has timesteps of its own"
        chosen = self.steps.choose(len(self.sampler), pair_generator(self.seed, "trained steps", 0, key))
        return chosen.tolist(), self.sampler.timesteps[chosen]

    def renoise(self, batch: RenoisedSamples) -> Renoised:
        """Noise the finished latents of a batch to its timesteps; the noise depends on seed and key alone."""
        process, shape = self.policy.noise_process, batch.latents.shape[1:]
        # By key alone, not by epoch: a row that is trained on twice meets the same noise, as in a resumed run.
        generators = [pair_generator(self.seed, "forward noise", 0, key) for key in batch.keys]
        noise = torch.stack([torch.randn(shape, generator=one) for one in generators]).to(batch.latents)
        return Renoised(
            process.add_noise(batch.latents, noise, batch.timesteps),
            process.target(batch.latents, noise, batch.timesteps),
            process.sigma(batch.timesteps).to(batch.latents.device),
        )

    def predict(self, batch: SampledStates, states: Renoised) -> Tensor:
        """Return the network's output for a batch ``(B, C, ...)`` under the adapter that is active now."""
        conditioning, uncond = self.conditioning(batch.prompts)
        return self.policy.predict_guided(states.latents, batch.timesteps, conditioning, uncond, self.guidance_scale)

    def predict_under(self, adapter: str | None, batch: SampledStates, states: Renoised) -> Tensor:
        """Return the output for a batch under another adapter, or under none (the reference), without gradient."""
        with torch.no_grad(), self.policy.adapters.use(adapter):
            return self.predict(batch, states)

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""


class DiffusionNFTModule(ForwardProcessModule):
    """DiffusionNFT (arXiv:2509.16117): learn from good and bad finished samples by their forward process.

    An older copy of the adapter samples. It follows the policy before each rollout, as slowly as ``old`` says. Logs
    ``train/loss``, ``train/policy``, ``train/kl``.
    """

    usual_steps = RandomSteps()

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource,
        old: DecayRamp | None = None,
        loss: NFTLoss | None = None,
        **options: Any,
    ) -> None:
        super().__init__(policy, reward, copies={OLD: old or DecayRamp()}, **options)
        self.loss = loss or NFTLoss()

    def training_step(self, batch: RenoisedSamples, batch_idx: int) -> Tensor:
        states = self.renoise(batch)
        old = self.predict_under(OLD, batch, states)
        held = self.loss.needs_reference or self.guard is not None
        reference = self.predict_under(None, batch, states) if held else None
        velocity = self.predict(batch, states)
        result = self.loss(velocity, old, states.target, states.sigmas, batch.advantage, reference)
        loss = self.guarded(result.loss, velocity, reference)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log_dict({"train/policy": result.policy, "train/kl": result.kl}, batch_size=len(batch))
        return loss


class AWMModule(ForwardProcessModule):
    """Advantage weighted matching (AWM, arXiv:2509.25050): a policy gradient on the denoising error of samples.

    The policy itself samples. A moving average of it, which follows as slowly as ``average`` says, is the second point
    that the policy is held to, beside the reference. Logs ``train/loss``, ``train/policy``, ``train/kl``,
    ``train/average_kl``, ``train/clipped``, ``train/ratio``.
    """

    usual_sampling = Sampling(14)
    usual_steps = StratifiedSteps()

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource,
        average: DecayRamp | None = None,
        loss: MatchingLoss | None = None,
        **options: Any,
    ) -> None:
        loss = loss or MatchingLoss()
        if average is not None and not loss.average_weight:
            raise InputError("average has no effect with loss.average_weight=0; leave it out, or raise the weight")
        copies = {OLD: DecayRamp(most=0.0)}
        if loss.average_weight:
            copies[AVERAGE] = average or DecayRamp(most=0.3)
        super().__init__(policy, reward, copies=copies, **options)
        self.loss = loss

    def training_step(self, batch: RenoisedSamples, batch_idx: int) -> Tensor:
        states, loss = self.renoise(batch), self.loss
        kl = average_kl = old = None
        if self.trainer.global_step != self.followed:  # before the first optimiser step the policy equals its copy
            old = loss.log_prob(self.predict_under(OLD, batch, states), states.target, states.sigmas)
        held = loss.kl_weight or self.guard is not None
        reference = self.predict_under(None, batch, states) if held else None
        average = self.predict_under(AVERAGE, batch, states) if loss.average_weight else None
        velocity = self.predict(batch, states)
        log_prob = loss.log_prob(velocity, states.target, states.sigmas)
        if reference is not None and loss.kl_weight:
            kl = velocity_divergence(velocity, reference, states.sigmas, loss.divergence)
        if average is not None:
            average_kl = velocity_divergence(velocity, average, states.sigmas, loss.divergence)
        result = loss(log_prob, log_prob.detach() if old is None else old, batch.advantage, kl, average_kl)
        total = self.guarded(result.loss, velocity, reference)
        self.log("train/loss", total, prog_bar=True, batch_size=len(batch))
        values = {name: getattr(result, name) for name in ("policy", "kl", "average_kl", "clipped", "ratio")}
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=len(batch))
        return total
