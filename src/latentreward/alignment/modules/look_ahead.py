r"""Training of a latent reward to look ahead: from a noisy state to the score of the sample that it ends in.

A reward of noisy states averages over all pictures from which a state could come. A deterministic sampler makes one
picture of it, and rollouts give states and ends for nothing. With s_i the scores of the K finished samples of a prompt,
r_i what the reward says of their states after equally many steps, and bars for means over the prompt's samples,

.. math:: l = \frac1K \sum_i \Bigl(\frac{(r_i - \bar r) - (s_i - \bar s)}{\mathrm{std}(s - \bar s)}\Bigr)^2
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latentreward.alignment.modules.alignment import AlignmentModule, prompts_of
from latentreward.alignment.modules.grpo import group_statistics
from latentreward.alignment.policies.checkpoint import fill_adapter, read_policy_adapter
from latentreward.alignment.policies.loading import PolicySource
from latentreward.alignment.policies.policy import Policy
from latentreward.alignment.rewards.base import RewardSource, check_sigmas, score_finished
from latentreward.alignment.rewards.latent import EncodedPrompts, LatentReward, convert_states, same_levels
from latentreward.alignment.rewards.look_ahead import RECORD, centred, seen_by, within_prompts
from latentreward.alignment.rollout.samplers import Sampling
from latentreward.alignment.rollout.trajectories import sample_trajectories
from latentreward.core.bootstrap import Interval
from latentreward.core.contracts import (
    Conditioning,
    LookAheadStates,
    PairScores,
    PathText,
    PromptBatch,
    join_rows,
    sources_of,
)
from latentreward.core.errors import InputError, check_at_least_one, check_choices
from latentreward.core.running import evaluating
from latentreward.data.alignment.experience import of_all_ranks
from latentreward.data.alignment.prompt_files import read_prompts
from latentreward.reward.losses.base import PreferenceLoss
from latentreward.reward.scoring.find import ModelSource, find_reward
from latentreward.reward.scoring.importers import PublishedLRM
from latentreward.reward.scoring.reward_model import RewardModel

Trains = Literal["own", "head"]
SMALLEST = 1e-6
"""Least spread of scores that is divided by; below it all scores of a rollout are equal, but for rounding."""


class LookAhead(nn.Module):
    """A stored reward that learns to foresee the scores of what a policy's states end in.

    Args:
        start: The stored reward that is trained on.
        policy: Policy whose states it scores.
        trains: ``own`` trains what the stored reward holds itself, beside its base: the head, adapters, and networks
            that were trained in full, but no text encoder. ``head`` trains the head alone.
        loss: Loss of pairs of a prompt's samples; None takes the regression.
    """

    def __init__(
        self, start: ModelSource, policy: Policy, trains: Trains = "own", loss: PreferenceLoss | None = None
    ) -> None:
        super().__init__()
        self.start, self.pair_loss = start, loss
        scorer = LatentReward(**vars(start), share="never").load(policy)
        self.model, self.process = scorer.model, policy.noise_process
        self.converts = not same_levels(self.process, self.model.backbone.noise_process)
        self.encoded, self.rows = EncodedPrompts(Conditioning(torch.empty(0, 0, 0)), None), dict[str, int]()
        recipe, backbone = self.model.recipe, self.model.backbone
        for name, weight in backbone.named_parameters() if trains == "own" else ():
            part = name.partition(".")[0]
            own = ".lora_" in name or (recipe is not None and part in recipe.own)
            weight.requires_grad_(own and part not in ("text_encoder", "vae"))
        self.model.head.requires_grad_(True)
        backbone.drop_unread(self.model.head.reads_text, self.model.head.reads_temb)

    @torch.no_grad()
    def remember(self, prompts: Sequence[str]) -> None:
        """Encode prompts, and keep them on the CPU in place of those kept before."""
        # One by one: the last bits can depend on the batch size, and a resumed run has fewer prompts left.
        found = [self.model.encode_prompts([prompt]) for prompt in prompts]
        empty = [one.to("cpu") for _, one in found if one is not None]
        several = any(map(sources_of, prompts))
        uncond = Conditioning.join(empty if several else empty[:1]) if empty else None
        self.encoded = EncodedPrompts(Conditioning.join([one.to("cpu") for one, _ in found]), uncond)
        self.rows = {prompt: row for row, prompt in enumerate(prompts)}

    def forward(self, prompts: Sequence[str], latents: Tensor, timesteps: Tensor) -> Tensor:
        """Score K states of each of N prompts: ``latents`` ``(N, K, C, ...)``, ``timesteps`` ``(N,)``; ``(N, K)``."""
        count = latents.shape[1]
        if not self.rows.keys() >= {*prompts}:
            self.remember([*dict.fromkeys(prompts)])
        rows = torch.tensor([self.rows[prompt] for prompt in prompts]).repeat_interleave(count)
        states, times = latents.flatten(0, 1), timesteps.repeat_interleave(count)
        if self.converts:
            states, times = convert_states(states, times, self.process, self.model.backbone.noise_process)
        conditioning, uncond = self.encoded.select(rows)
        encoded = conditioning.trimmed().to(latents.device), None if uncond is None else uncond.to(latents.device)
        return self.model(states, times, *encoded).float().view(-1, count)

    def loss(self, predicted: Tensor, batch: LookAheadStates) -> Tensor:
        """Compute the mean loss of predictions ``(N, K)`` for a batch, float32."""
        if self.pair_loss is None:
            spread = batch.spread.where(batch.spread > SMALLEST, 1.0)
            return ((centred(predicted) - centred(batch.scores)) / spread[:, None]).square().mean()
        first, second = zip(*combinations(range(predicted.shape[1]), 2), strict=True)
        chosen, rejected = predicted[:, [*first]].flatten(), predicted[:, [*second]].flatten()
        better = (batch.scores[:, [*first]] - batch.scores[:, [*second]]).flatten().sign()
        sigmas = self.process.sigma(batch.timesteps.cpu()).to(chosen).repeat_interleave(len(first))
        pairs = PairScores(chosen, rejected, (better + 1) / 2, torch.ones_like(better), sigmas, sigmas)
        found: Tensor = self.pair_loss(pairs)
        return found

    def save(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Write the trained reward as a model folder, with ``record`` as what it was trained to foresee."""
        whole = find_reward(self.start).load(RewardModel)  # with VAE and text encoders of its own
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        buffers = {f"head.{name}": value for name, value in self.model.head.named_buffers()}
        with torch.no_grad():
            for name, value in (*whole.named_parameters(), *whole.named_buffers()):
                if name in trained or name in buffers:
                    value.copy_((trained | buffers)[name])
        assert whole.recipe is not None
        whole.recipe = replace(whole.recipe, training={**whole.recipe.training, RECORD: dict(record)})
        whole.save_pretrained(folder)


def told(before: Mapping[int, Interval], after: Mapping[int, Interval]) -> str:
    """Return a table of the correlations by finished steps, before and after training."""
    lines = [f"{'finished steps':>15}  {'ρ before':<22}  ρ looking ahead"]
    for step, old in before.items():
        shown = [f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in (old, after[step])]
        lines.append(f"{step:>15}  {shown[0]:<22}  {shown[1]}")
    return "\n".join(lines)


class LookAheadModule(AlignmentModule):
    """Train a latent reward to look ahead, by the states and ends of a policy's own samples; the policy stays as it is.

    The end of the run writes the reward as the model folder ``look_ahead`` in the run's log folder, with a record of
    policy, sampler, guidance and ρ, the correlation of its scores with those of the finished samples within prompts, by
    finished steps on held-out prompts. See :class:`~latentreward.alignment.Halving`; logs ``train/loss`` and
    ``train/correlation``, of the batch that it is about to learn from.

    Args:
        policy: The generator.
        start: The stored latent reward that is trained on.
        held_out: Prompts, or a file of them, on which ρ is measured; none of the training prompts.
        reward: Reward that scores finished samples; None takes ``start``.
        checkpoint: Checkpoint of an alignment run on ``policy``, whose adapter samples.
        sampling: Settings of the sampler; None takes 20 steps without noise.
        record: Numbers of finished steps after which states are recorded; 0 is the noise.
        num_samples: Samples K of each prompt.
        reward_sigmas: Noise levels at which a latent reward scores finished samples.
        trains: See :class:`LookAhead`.
        loss: Loss of pairs of a prompt's samples; None takes the regression of their differences.
        prompts_at_once: Prompts of a rollout that are sampled at once, to bound memory; None takes all.
        options: See :class:`~latentreward.alignment.AlignmentModule`.
    """

    experience = LookAheadStates

    def __init__(
        self,
        policy: PolicySource,
        start: ModelSource,
        held_out: PathText | list[str],
        reward: RewardSource | None = None,
        checkpoint: PathText | None = None,
        sampling: Sampling | None = None,
        record: Sequence[int] = (0, 1, 2, 3, 4, 6, 8, 10, 12),
        num_samples: int = 8,
        reward_sigmas: Sequence[float] = (0.05,),
        trains: Trains = "own",
        loss: PreferenceLoss | None = None,
        prompts_at_once: int | None = None,
        **options: Any,
    ) -> None:
        sampling = sampling or Sampling()
        check_choices(LookAhead, trains=trains)
        check_at_least_one(prompts_at_once=prompts_at_once, num_samples=num_samples - 1)
        check_sigmas(reward_sigmas)
        check_record(record, sampling.num_inference_steps)
        if loss is not None and loss.needs_cross_scores:
            raise InputError(f"loss: {type(loss).__name__} compares prompts; take one of pairs, as ThurstoneLoss")
        held = tuple(dict.fromkeys(held_out if isinstance(held_out, list) else read_prompts(str(held_out), "held_out")))
        saved = None if checkpoint is None else read_policy_adapter(checkpoint, trusted=True)
        if saved is not None:
            policy = replace(policy, lora=saved.source.lora)
        given = LatentReward(**vars(start))
        given.require_latents_of(policy)
        if isinstance(given.stored, PublishedLRM) and start.base is None:
            raise InputError(f"start.base: {start.path} holds no VAE to be stored with; give the pipeline of its base")
        sampler = sampling.sampler(policy.resolve_family())
        super().__init__(policy, reward or given, **options)
        if saved is not None:
            fill_adapter(self.policy, saved, checkpoint or "")
        self.policy.requires_grad_(False).eval()
        self.sampling, self.sampler, self.record, self.num_samples = sampling, sampler, tuple(record), num_samples
        self.reward_sigmas, self.prompts_at_once = tuple(reward_sigmas), prompts_at_once
        self.held_out = PromptBatch(held, tuple(f"held out/{number}" for number in range(len(held))))
        self.before: dict[int, Interval] = {}
        self.ahead = LookAhead(start, self.policy, trains, loss)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if shared := {*self.held_out.prompts} & {*prompts_of(self.trainer)}:
            raise InputError(f"held_out: {len(shared)} of its prompts are among those of data.prompts; give others")

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            raise InputError("trainer.strategy: LookAheadModule trains one whole reward in each process; use ddp")

    def states_of(self, prompts: PromptBatch) -> list[LookAheadStates]:
        """Sample K trajectories of each of P prompts; return P rows for each recorded number of steps, on the CPU."""
        names, settings = prompts.times(self.num_samples), (self.sampling, self.guidance_scale, self.seed)
        taken = sample_trajectories(self.policy, self.sampler, names, *settings)
        scores = score_finished(self.reward, taken.finished, prompts, self.seed, self.reward_sigmas)
        return look_ahead_states(prompts, self.record, taken.latents[[*self.record]], taken.timesteps, scores)

    def make_experience(self, prompts: PromptBatch) -> LookAheadStates:
        parts = [self.states_of(part) for part in prompts.split(self.prompts_at_once)]
        scores = torch.cat([part[0].scores for part in parts])
        self.rollout_statistics = group_statistics(torch.zeros(1), scores.T[None])
        spread = centred(self.of_all_ranks(scores.to(self.device))).std(correction=0).cpu()
        rows = join_rows([row for part in parts for row in part])
        return replace(rows, spread=spread.expand(len(rows)))

    def training_step(self, batch: LookAheadStates, batch_idx: int) -> Tensor:
        predicted = self.ahead(batch.prompts, batch.latents, batch.timesteps)
        loss = self.ahead.loss(predicted, batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        own, ends = centred(predicted.detach()), centred(batch.scores)
        agreement = (own * ends).sum() / (own.square().sum() * ends.square().sum()).sqrt().clamp(min=SMALLEST**2)
        self.log("train/correlation", agreement, prog_bar=True, batch_size=len(batch))
        return loss

    def prepare_prompts(self, prompts: Sequence[str]) -> None:
        with torch.no_grad(), self.compute_precision():
            self.ahead.remember(prompts)

    @torch.no_grad()
    def correlations(self) -> dict[int, Interval]:
        """Measure ρ on the held-out prompts, by finished steps; collective."""
        own = self.held_out.select(range(self.trainer.global_rank, len(self.held_out), self.trainer.world_size))
        found: list[dict[int, tuple[Tensor, Tensor]]] = []
        with evaluating(self), self.compute_precision():
            for part in own.split(self.prompts_at_once or 8):
                self.ahead.remember([*dict.fromkeys(part.prompts)])
                found.append({})
                for step, row in zip(self.record, self.states_of(part), strict=True):
                    there = row.latents.to(self.device), row.timesteps.to(self.device)
                    found[-1][step] = self.ahead(row.prompts, *there).cpu(), row.scores
        parts = [part for rank in of_all_ranks(found) for part in rank]
        columns = {step: zip(*(part[step] for part in parts), strict=True) for step in self.record}
        return {step: within_prompts(*map(torch.cat, pair)) for step, pair in columns.items()}

    def on_fit_start(self) -> None:
        """Check the reward as other modules do, and measure what the start foresees; a resumed run knows that."""
        super().on_fit_start()
        if not self.before:
            self.before = self.correlations()

    def on_fit_end(self) -> None:
        """Measure what the trained reward foresees, print it beside that of before, and write the model folder."""
        after = self.correlations()
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir) / RECORD
        if self.trainer.is_global_zero:
            record = seen_by(self.policy, self.sampling, self.guidance_scale)
            record["correlation"] = {str(step): list(one[:3]) for step, one in after.items()}
            self.ahead.save(folder, record)
            print(f"{told(self.before, after)}\n{folder}: the reward that looks ahead", flush=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[RECORD] = {str(step): list(one) for step, one in self.before.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.before = {int(step): Interval(*one) for step, one in checkpoint[RECORD].items()}


def check_record(record: Sequence[int], steps: int) -> None:
    """Raise InputError unless states are recorded after some of the sampler's ``steps``, each once, in order."""
    if not record or [*record] != sorted({*record}) or record[0] < 0 or record[-1] >= steps:
        raise InputError(f"record={[*record]} must name numbers of finished steps, ascending, of 0 to {steps - 1}")


def look_ahead_states(
    prompts: PromptBatch, record: Sequence[int], states: Tensor, timesteps: Tensor, scores: Tensor
) -> list[LookAheadStates]:
    """Return a row for each of P prompts, for each of S recorded numbers of finished steps, on the CPU.

    ``states`` are ``(S, P·K, C, ...)``, K of each prompt in turn, ``scores`` ``(P·K,)`` those of the ends, and
    ``timesteps`` ``(T,)`` those of the sampler. The spread is still to be told.
    """
    ends = scores.view(len(prompts), -1).cpu()
    return [
        LookAheadStates(
            tuple(f"{key}/{step:04d}" for key in prompts.keys),
            prompts.prompts,
            own.unflatten(0, ends.shape).cpu(),
            timesteps[step].expand(len(prompts)),
            ends,
            torch.zeros(len(prompts)),
        )
        for step, own in zip(record, states, strict=True)
    ]
