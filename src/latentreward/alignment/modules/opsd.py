r"""DiffusionOPSD: learn from a reward's gradient at predicted clean latents, without a graph through the sampler.

DiffusionOPSD (Apache-2.0 code: worldbench/DiffusionOPSD): targets found by climbing a reward from a prediction.

With y₀ the clean latents that the older policy predicts for a state, radius δ = ρ‖y₀‖, and n steps in each direction,

.. math::
    y^\pm \leftarrow y^\pm \pm \frac{\eta\,\delta}{n}\,\frac{\nabla R(y^\pm)}{\lVert\nabla R(y^\pm)\rVert},
    \qquad y^\pm \leftarrow y_0 + (y^\pm - y_0)\,\min\bigl(1, \delta / \lVert y^\pm - y_0\rVert\bigr).

The loss is DiffusionNFT's with a target for each branch (:class:`~latentreward.alignment.NFTLoss`), without its 1/β.
After one step the two targets are mirror images, and the loss does not depend on the optimality r.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from latentreward.alignment.losses.nft import NFTLoss
from latentreward.alignment.modules.forward_process import ForwardProcessModule, Renoised
from latentreward.alignment.modules.ram import directed_target
from latentreward.alignment.policies.loading import PolicySource
from latentreward.alignment.policies.moving_average import OLD, DecayRamp
from latentreward.alignment.rewards.base import RewardSource, score_finished
from latentreward.alignment.rollout.reward_guidance import refuse_float16, require_finite, require_gradient
from latentreward.alignment.rollout.trajectories import PromptedPolicy, RolloutDraws
from latentreward.core.contracts import PromptBatch, SampledStates
from latentreward.core.errors import check_at_least_one, check_range
from latentreward.reward.losses.base import per_row


def reward_ascent(
    anchor: Tensor, slope_of: Callable[[Tensor], Tensor], radius: Tensor, steps: int = 2, rate: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Move predicted clean latents y₀ ``(B, C, ...)`` up and down a reward, by at most a radius, without gradient.

    Args:
        anchor: y₀.
        slope_of: Function of latents, called 2n − 1 times: the gradient of each row's reward.
        radius: ``(B,)`` δ, positive.
        steps: n, at least 1.
        rate: η, positive; 1 reaches the radius along a straight line.
    """
    first, ends = slope_of(anchor), []
    for sign in (1.0, -1.0):
        end = anchor
        for number in range(steps):
            slope = slope_of(end) if number else first
            direction = slope / per_row(_length(slope) + 1e-12, slope)
            away = directed_target(end, direction, sign * rate / steps * radius) - anchor
            end = directed_target(anchor, away, (radius / _length(away).clamp(min=1e-12)).clamp(max=1))
        ends.append(end)
    return ends[0], ends[1]


def _length(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows.flatten(1), dim=1)


class DiffusionOPSDModule(ForwardProcessModule):
    """DiffusionOPSD (released code: worldbench/DiffusionOPSD) with one sample a prompt and r = ½, for any network.

    The older copy of the adapter samples to the step nearest to ``query_sigma``, no further. There the clean latents
    that the copy predicts are moved up and down the reward's gradient, and the policy learns to predict them. Logs
    ``train/loss``, ``train/kl`` and ``train/reward``, that of the prediction.

    Args:
        reward: Source of a differentiable reward that judges each sample by itself.
        query_sigma: Noise level of the states, in (0, 1) and among those of the sampler's steps. Published: 0.278 for
            SD3.5-M, with pixel rewards.
        radius: ρ, largest distance of a target from the prediction, as a share of the prediction's norm; 0.1 as
            published.
        ascent_steps: Steps n of the climb, at least 1. Published: 2.
        old: How slowly the copy that samples follows the policy; the default is the published one.
        loss: Loss with its reference term ``kl_weight``; None takes a weight of 1. Without the term nothing holds the
            policy, since the predictions that targets lie around move with it.
        options: See :class:`ForwardProcessModule`; ``reward_sigmas`` are the levels at which a latent reward scores.
    """

    experience = SampledStates
    flows_only = compares = prunes = False

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource,
        query_sigma: float = 0.6,
        radius: float = 0.1,
        ascent_steps: int = 2,
        old: DecayRamp | None = None,
        loss: NFTLoss | None = None,
        **options: Any,
    ) -> None:
        check_range("(0, 1)", "0.6 is the default", query_sigma=query_sigma)
        check_range("(0, inf)", "DiffusionOPSD uses 0.1", radius=radius)
        check_at_least_one(ascent_steps=ascent_steps)
        reward.require_gradient(type(self).__name__)
        reward.require_alone(f"{type(self).__name__} has one sample a prompt")
        family, sampling = policy.resolve_family(), options.get("sampling") or self.usual_sampling
        levels = family.noise_process.sigma(sampling.sampler(family).timesteps)
        known = f"these are the levels of the {len(levels)} steps"
        check_range(f"[{levels[-1]:g}, {levels[0]:g}]", known, query_sigma=query_sigma)
        copies = {OLD: old or DecayRamp()}
        super().__init__(policy, reward, copies=copies, steps=None, num_samples=1, advantage=None, **options)
        require_gradient(self.reward, type(self).__name__)
        self.radius, self.ascent_steps, self.loss = radius, ascent_steps, loss or NFTLoss(kl_weight=1.0)
        self.query = int((levels - query_sigma).abs().argmin())

    def setup(self, stage: str) -> None:
        super().setup(stage)
        refuse_float16(self.trainer.precision)

    def make_experience(self, prompts: PromptBatch) -> SampledStates:
        self.move_copies()
        shape, states = self.sampling.latent_shape(self.policy.family), []
        for part in prompts.split(self.prompts_at_once):
            network = PromptedPolicy.of(self.policy, part, self.guidance_scale)
            latents = RolloutDraws(self.seed, part.keys).initial(shape).to(self.device)
            with self.policy.adapters.use(OLD), self.policy.adapters.merged():
                for _, timestep in islice(self.sampler.steps(), self.query):
                    output = network(latents, timestep)
                    latents = self.sampler.transition(latents, output, torch.full((len(part),), timestep)).mean
            states.append(latents.cpu())
        timesteps = self.sampler.timesteps[self.query].expand(len(prompts))
        return SampledStates(prompts.keys, prompts.prompts, torch.cat(states), timesteps)

    def targets(self, batch: SampledStates, old: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the clean latents y⁺ and y⁻ ``(B, C, ...)``, and the rewards ``(B,)`` of their common start."""
        prompts, rewards = PromptBatch(batch.prompts, batch.keys), []

        def slope_of(latents: Tensor) -> Tensor:
            leaf = latents.detach().requires_grad_()
            with torch.enable_grad():
                rewards.append(score_finished(self.reward, leaf, prompts, self.seed, self.reward_sigmas))
            return require_finite(torch.autograd.grad(rewards[-1].sum(), leaf)[0], self.reward)

        anchor = self.sampler.clean(batch.latents, old, batch.timesteps)
        radius = self.radius * anchor.flatten(1).norm(dim=1)
        return *reward_ascent(anchor, slope_of, radius, self.ascent_steps), rewards[0].detach()

    def training_step(self, batch: SampledStates, batch_idx: int) -> Tensor:
        zeros = torch.zeros_like(batch.latents)
        # Predicted clean latents are linear in the output: a velocity's σ, a noise's s/a.
        without = self.sampler.clean(batch.latents, zeros, batch.timesteps)
        level = self.sampler.clean(zeros, zeros - 1, batch.timesteps)
        states = Renoised(batch.latents, zeros, level.flatten(1)[:, 0])
        old = self.predict_under(OLD, batch, states)
        above, below, rewards = self.targets(batch, old)
        held = self.loss.needs_reference or self.guard is not None
        reference = self.predict_under(None, batch, states) if held else None
        output = self.predict(batch, states)
        ends = (without - above) / level, (without - below) / level
        result = self.loss(output, old, ends, states.sigmas, torch.zeros(len(batch)), reference)
        loss = self.guarded(result.loss, output, reference)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log_dict({"train/kl": result.kl, "train/reward": rewards.mean()}, batch_size=len(batch))
        return loss
