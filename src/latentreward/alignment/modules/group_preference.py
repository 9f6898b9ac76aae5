"""DGPO (arXiv:2510.08425) and CRD (arXiv:2603.14128): learn from all finished samples of a prompt at once."""

from typing import Any

import torch
from torch import Tensor

from latentreward.alignment.losses.group_preference import CRDLoss, DGPOLoss
from latentreward.alignment.modules.forward_process import ForwardProcessModule, Renoised
from latentreward.alignment.policies.loading import PolicySource
from latentreward.alignment.policies.moving_average import AVERAGE, OLD, DecayRamp
from latentreward.alignment.rewards.base import RewardSource
from latentreward.alignment.rollout.step_choice import NoisiestSteps, RandomSteps
from latentreward.core.contracts import RenoisedGroups, RenoisedSamples
from latentreward.core.errors import errors_at


class DGPOModule(ForwardProcessModule):
    """Direct group preference optimisation (DGPO, arXiv:2510.08425), for flows.

    A row of a batch is a prompt at one noise level, with all its K samples and one noise for them; ``data.batch_size``
    counts prompts. Levels are drawn for each prompt; the released code draws them once a rollout, for all prompts.
    An older copy of the adapter samples, and bounds how far the policy may go from it. Logs ``train/loss``,
    ``train/policy``, ``train/kl``, ``train/weight`` and ``train/clipped``.

    Args:
        old: How slowly the copy that samples follows the policy; None takes the published 0.001 · step, at most 0.3.
    """

    experience = RenoisedGroups
    usual_steps = NoisiestSteps()

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource,
        old: DecayRamp | None = None,
        loss: DGPOLoss | None = None,
        **options: Any,
    ) -> None:
        super().__init__(policy, reward, copies={OLD: old or DecayRamp(most=0.3)}, **options)
        self.loss = loss or DGPOLoss()

    def training_step(self, batch: RenoisedGroups, batch_idx: int) -> Tensor:
        samples = batch.samples(shared_noise=True)
        states = self.renoise(samples)
        old = None if self.loss.clip_range is None else self.predict_under(OLD, samples, states)
        reference = self.predict_under(None, samples, states)
        velocity = self.predict(samples, states)
        result = self.loss(velocity, old, states.target, batch.advantage, reference)
        loss = self.guarded(result.loss, velocity, reference)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        values = {"policy": result.policy, "kl": result.kl, "weight": result.weight.mean()}
        values["clipped"] = result.clipped.float().mean()
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=len(batch))
        return loss


class CRDModule(ForwardProcessModule):
    """Centred reward distillation (CRD, arXiv:2603.14128), for flows.

    A row of a batch is a prompt at one noise level, with all its K samples, each with its own noise;
    ``data.batch_size`` counts prompts. One older copy of the adapter samples; another one, of other age, is what
    implicit rewards compare the policy with. Logs ``train/loss``, ``train/policy`` and ``train/kl``.

    Args:
        old: How slowly the copy that samples follows the policy; None takes the published one, which follows at once
            up to step 75, and then less by 0.0075 a step, to 0.999.
        average: How slowly the copy follows that implicit rewards compare with; None takes the published 0.25 + 0.005 ·
            step, at most 0.999.
        reference_guidance_scale: Guidance scale of the reference, as the pipeline takes it; None takes the policy's,
            which is none. Published: 4.5.
    """

    experience = RenoisedGroups
    usual_steps = RandomSteps()
    prunes = False

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource,
        old: DecayRamp | None = None,
        average: DecayRamp | None = None,
        reference_guidance_scale: float | None = None,
        loss: CRDLoss | None = None,
        **options: Any,
    ) -> None:
        scale, family = reference_guidance_scale, policy.resolve_family()
        with errors_at("reference_guidance_scale: "):
            scale = None if scale is None else family.guidance(scale)
        copies = {OLD: old or DecayRamp(0.0075, 0.999, 75), AVERAGE: average or DecayRamp(0.005, 0.999, -50)}
        super().__init__(policy, reward, copies=copies, **options)
        self.reference_scale, self.loss = self.guidance_scale if scale is None else scale, loss or CRDLoss()
        self.guided = family.needs_uncond(self.reference_scale)  # the policy itself is not guided

    @torch.no_grad()
    def reference_of(self, samples: RenoisedSamples, states: Renoised) -> Tensor:
        """Return the guided velocities ``(B, C, ...)`` of the reference."""
        encoded = self.conditioning(samples.prompts)
        with self.policy.reference():
            return self.policy.predict_guided(states.latents, samples.timesteps, *encoded, self.reference_scale)

    def training_step(self, batch: RenoisedGroups, batch_idx: int) -> Tensor:
        samples = batch.samples(shared_noise=False)
        states = self.renoise(samples)
        average, reference = self.predict_under(AVERAGE, samples, states), self.reference_of(samples, states)
        velocity = self.predict(samples, states)
        result = self.loss(velocity, average, states.target, batch.advantage, reference)
        loss = self.guarded(result.loss, velocity, reference)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log_dict({"train/policy": result.policy, "train/kl": result.kl}, batch_size=len(batch))
        return loss
