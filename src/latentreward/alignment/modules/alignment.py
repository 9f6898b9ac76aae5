"""Base class of the alignment modules: loading, optimiser, checkpoints and rollouts of a policy; no formula."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import MISSING, asdict, fields
from typing import Any, Self, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import AdamW

from latentreward.alignment.policies.checkpoint import SOURCE
from latentreward.alignment.policies.loading import PolicySource
from latentreward.alignment.rewards.base import Reward, RewardSource
from latentreward.alignment.rewards.http import RemoteReward
from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.alignment.rollout.advantages import Advantage
from latentreward.alignment.rollout.candidates import Branching, CandidateStep, candidate_steps, gap_quantiles
from latentreward.alignment.rollout.samplers import Sampling, Transition, reporting_steps
from latentreward.alignment.rollout.trajectories import RolloutDraws
from latentreward.core.contracts import (
    Conditioning,
    NoisyStates,
    PromptBatch,
    RolloutStatistics,
    SampledStates,
    sources_of,
)
from latentreward.core.errors import InputError
from latentreward.core.promises import place_of
from latentreward.core.running import evaluating, phase, run_seed
from latentreward.core.storage.progress import Progress
from latentreward.data.alignment.experience import other_rows, wrong_rows
from latentreward.diffusion.encoders.stored_prompts import StoredPrompts
from latentreward.diffusion.encoders.vae import edit_of_grey
from latentreward.reward import RemoteError
from latentreward.reward.modules.sharding import shard_policy, shard_scorers
from latentreward.reward.modules.training import FrozenBase, OptimizerSteps, single_optimizer, unseen_settings

Kind = TypeVar("Kind", bound=nn.Module)
HeldBuffer = tuple[nn.Module, str, Tensor | None, Tensor | None]
"""Module and name of a buffer, its tensor, and a copy of its value; None for a buffer that is not set yet."""


class RolloutLog(Callback):
    """Callback of every alignment module: logs each rollout with the first batch that follows it."""

    def __init__(self) -> None:
        self.part_means: list[float] = []  # mean score of each reward of a mixture, before normalisation
        self.began = self._seconds = 0.0
        self._times: dict[str, float] = {}
        self._seen: RolloutStatistics | tuple[()] | None = ()  # statistics that were logged; at first not even None

    def add_times(self, seconds: float, process_seconds: float) -> None:
        """Note the time that a rollout took, and that of the processor."""
        self._seconds += seconds
        self._times = {"seconds": seconds, "process_seconds": process_seconds}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.began, self._seconds = time.perf_counter(), 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Log the last rollout: time, speed, share of the run's time, scores, mean gap, share of rows kept."""
        # At the first batch after a rollout, and in steps that are logged: each value costs some kernels.
        seen, self._seen = self._seen, pl_module.rollout_statistics
        if seen is self._seen and not trainer._logger_connector.should_update_logs:
            return
        values = self._times | pl_module.rollout_values
        # A resumed run begins with rows in store, before any rollout of its own.
        if self._times:
            values["time_share"] = self._seconds / (time.perf_counter() - self.began)
        if (statistics := pl_module.rollout_statistics) is not None and statistics.gap.numel():
            mean = statistics.scores.float().mean().item()
            pl_module.log("rollout/score", mean, prog_bar=True, batch_size=len(batch))
            spread = statistics.scores.float().std(dim=1, correction=0)
            means = {"score_std": spread, "gap": statistics.gap, "kept_share": statistics.kept}
            values |= {name: value.float().mean().item() for name, value in means.items()}
            if values.get("seconds"):
                values["samples_per_second"] = statistics.scores.numel() / values["seconds"]
        values |= {f"reward_{number}": mean for number, mean in enumerate(self.part_means, 1)}
        pl_module.log_dict({f"rollout/{name}": value for name, value in values.items()}, batch_size=len(batch))


class AlignmentModule(LightningModule):
    """Base of the modules that train a policy's adapter: by given pairs, by a reward, or by a reward of own rollouts.

    A method that learns from its own rollouts sets :attr:`experience` and implements :meth:`make_experience`.
    ``PromptDataModule`` calls :meth:`roll_out` when fewer rows are left than the next optimiser step needs.

    Args:
        policy: The generator.
        reward: Source of the reward, which scores latents of the policy; None for a method without a reward.
        guidance_scale: Guidance scale in sampling and in training, as the pipeline of the policy's family takes it. SD
            and SD3: at least 1, which switches guidance off. None takes the family's own: 5 for SD and SD3, none for
            distilled networks.
        optimizer: Optimiser of the adapter. Vectors and scalars get no weight decay.
        lr_scheduler: Learning rate schedule, stepped after each optimiser step; None keeps the rate constant.
        seed: Seed of all random numbers; None takes the run's ``seed_everything``.

    Attributes:
        policy: The loaded :class:`~latentreward.alignment.Policy`.
        reward: The loaded :class:`~latentreward.alignment.Reward`; None without one.
        experience: Class of a rollout's rows: a frozen dataclass with
            :class:`~latentreward.core.contracts.SampledStates` as its base, whose fields are tensors ``(N, ...)``,
            tuples of N values, or None. Rows of a checkpoint are made of it. None for a method without rollouts.
        rollout_statistics: Statistics of the last rollout, for callbacks: of this rank until the first batch of the
            rollout's rows, of all ranks from then on.
    """

    reward: Reward
    sampling = Sampling()  # settings of the sampler; a derived class sets its own
    experience: type[SampledStates] | None = None
    rollout_statistics: RolloutStatistics | None = None
    prompts_at_once: int | None = None  # prompts of a rollout that are sampled at once; None samples all of them
    # Makes the display of a rollout of so many steps in so many batches; None shows nothing.
    rollout_progress: Callable[[int, int], Progress] | None = None

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource | None = None,
        guidance_scale: float | None = None,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        # Before anything is loaded: a reward of another latent space would otherwise fail after minutes of loading.
        if reward is not None:
            reward.require_latents_of(policy)
        super().__init__()
        self.optimizer, self.lr_scheduler, self.seed = optimizer, lr_scheduler, run_seed(seed)
        self.lr: float | None = None  # replaces the optimiser's own; Lightning's finder sets it
        self.configured_lr: float | None = None
        family = policy.resolve_family()
        self.guidance_scale = family.guidance(guidance_scale)
        self.guided = family.needs_uncond(self.guidance_scale)  # whether encoded prompts come with the empty one
        self.policy_source, self.policy = policy, policy.load(self.seed)
        unseen = unseen_settings("policy", vars(policy), self.policy.text_encoder)
        self.frozen_base = FrozenBase(self.policy, self.policy.source, unseen, "policy.frozen_dtype")
        self.reward = None if reward is None else reward.load(self.policy)  # type: ignore[assignment]
        if self.reward is not None:
            self.reward.train(False)
            self.reward.requires_grad_(False)
        self.rollout_values: dict[str, float] = {}  # further values of the last rollout to log
        self.rollout_log = RolloutLog()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, weights_only: bool = True, **kwargs: Any) -> Self:  # type: ignore[override]
        kwargs["_instantiator"] = None  # else Lightning takes the function that the checkpoint names
        return super().load_from_checkpoint(checkpoint_path, weights_only=weights_only, **kwargs)

    def setup(self, stage: str) -> None:
        """Read the reward's weights, under bf16-mixed in bfloat16, and check prompts and the trainer's precision."""
        if self.trainer.precision == "bf16-mixed" and self.reward is not None:
            self.reward.set_precision(torch.bfloat16)
        self.policy.edit_at(self.sampling.height, self.sampling.width)
        if prompts := prompts_of(self.trainer):
            self.policy.family.check_prompts(prompts, "data.prompts")
            if self.reward is not None:
                self.reward.check_prompts(prompts)
        for scorer in self._reward_parts(LatentScorer):
            scorer.read_weights()
        # After the reward is in place: the digest of frozen weights that ranks compare covers it too.
        self.frozen_base.prepare(self)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            shard_policy(self.policy, mesh)
            backbones = [scorer.model.backbone for scorer in self._reward_parts(LatentScorer)]
            shard_scorers(backbones, {*self._reward_parts(nn.Module)}, mesh)

    def configure_optimizers(self) -> Any:
        self.configured_lr = self.lr
        return single_optimizer(self.parameters(), self.optimizer, self.lr_scheduler, lr=self.lr)

    def configure_callbacks(self) -> list[Callback]:
        return [OptimizerSteps(), self.rollout_log]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save where the policy was loaded from, so that the checkpoint alone is enough to load it again."""
        self.frozen_base.save(self, checkpoint, ())
        checkpoint[SOURCE] = asdict(self.policy_source)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint belongs to this policy's base, and fill in the weights that it leaves out."""
        self.frozen_base.check(self, checkpoint)

    def on_fit_start(self) -> None:
        """Let the reward score random latents at three noise levels, so that a faulty reward fails before training."""
        if self.reward is None:
            return
        shape = self.sampling.latent_shape(self.policy.family)
        self._compare_sizes(shape)
        noise = torch.randn(3, *shape, generator=torch.Generator().manual_seed(self.seed)).to(self.device)
        levels = self.policy.noise_process.timesteps
        timesteps = levels[[0, len(levels) // 2, -1]].to(self.device)
        # Running statistics would count these random latents; a resumed run must find them as they were.
        buffers = self._reward_buffers()
        with torch.no_grad(), self.compute_precision(), self.failing_together():
            # FSDP2 needs one call of the whole network before a reward that shares the network calls its blocks.
            stored = isinstance(self.policy.text_encoder, StoredPrompts)  # of EncodeOnce, which has no other prompts
            prompts = [""] * 3 if stored else ["", "a cat", "two dogs on a hill"]
            first = next(iter(prompts_of(self.trainer)), edit_of_grey(number=self.policy.family.sources[0]))
            prompts = [first] * 3 if sources_of(first) else prompts
            self.policy.predict(noise, timesteps, self.policy.encode_prompts(prompts))
            encoded = self.reward.encode_prompts(prompts[:1])
            self.reward(NoisyStates(noise, timesteps, torch.zeros(3, dtype=torch.int64), noise), encoded)
        for part, name, _, value in buffers:
            if value is None and part._buffers[name] is not None:
                raise InputError(
                    f"reward: buffer {name} of {type(part).__name__} is None before the first score, so that no "
                    "checkpoint could be resumed; register it with a tensor"
                )
            if not same(part._buffers[name], value):  # marked, so that checkpoints hold it
                with suppress(AttributeError):  # of a head, which tells itself whether it trains
                    part.changes_buffers = True  # type: ignore[assignment]
        restore(buffers)

    def _compare_sizes(self, shape: tuple[int, ...]) -> None:
        """Warn if the policy samples latents of a ``shape`` that a latent reward was not trained at."""
        height, width = (side * self.policy.latent_space.downscale for side in shape[-2:])
        for scorer in self._reward_parts(LatentScorer):
            if (sizes := scorer.model.image_sizes) is None:
                continue
            told, loader = "model.reward: trained", sizes.loader(height, width)
            if sizes.frames != (frames := self.sampling.frames):
                told += (
                    f" with frames={sizes.frames}, but the policy samples frames={frames}; set model.sampling.frames"
                )
                rank_zero_warn(f"{told}, or train a reward on as many")
            elif (loader.height, loader.width) != (height, width):
                told += f" on images of {sizes}, but the policy samples {height}x{width}; set model.sampling.height"
                rank_zero_warn(f"{told} and width, or train a reward at this size")

    def _reward_parts(self, kind: type[Kind]) -> list[Kind]:
        """Return the modules of a class in the reward, itself included."""
        return [] if self.reward is None else [part for part in self.reward.modules() if isinstance(part, kind)]

    def _reward_buffers(self, changing: bool = False) -> list[HeldBuffer]:
        """Return the buffers of the reward with copies of their values, or only those of modules that change them."""
        parts = self._reward_parts(nn.Module)
        return [
            (part, name, buffer, None if buffer is None else buffer.clone())
            for part in parts
            for name, buffer in part._buffers.items()
            if not changing or getattr(part, "changes_buffers", False)
        ]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let a failing reward server end the block on all ranks, with the reward's buffers as before the block."""
        # A rank whose server fails would leave the others waiting in a collective call until the timeout.
        remote = self._reward_parts(RemoteReward)
        before = self._reward_buffers(changing=True) if remote else []
        for part in remote:
            part.agree = self.trainer.strategy.reduce_boolean_decision  # type: ignore[assignment]
        try:
            yield
        except RemoteError:
            restore(before)
            raise
        finally:
            for part in remote:
                part.agree = bool  # type: ignore[assignment]

    def compute_precision(self) -> AbstractContextManager[Any]:
        """Return the context of the trainer's precision, for work outside training steps."""
        return self.trainer.precision_plugin.forward_context()

    @contextmanager
    def sampling_context(self) -> Iterator[None]:
        """Return the context of rollouts: evaluation mode without gradients, and the trainer's precision."""
        with evaluating(self), torch.no_grad(), self.compute_precision(), ExitStack() as more:
            if isinstance(getattr(self, "candidates", None), Branching):  # others merge as they sample
                more.enter_context(self.policy.adapters.merged())
            yield

    def make_experience(self, prompts: PromptBatch) -> SampledStates | None:
        """Roll out this rank's ``prompts`` and return the rows to train on, on the CPU; None if no row is kept.

        Implementations also set :attr:`rollout_statistics`. :meth:`roll_out` calls this method on all ranks at once
        with equally many prompts. Under FSDP2 all ranks must call the networks equally often.
        """
        raise NotImplementedError(f"{type(self).__name__} does not learn from rollouts")

    def candidate_steps(self, prompts: PromptBatch) -> Iterator[CandidateStep]:
        """Call the function of this name with ``sampler``, ``sampling`` and ``candidates`` of a derived class."""
        draws = RolloutDraws(self.seed, prompts.keys)
        settings = (self.candidates, self.sampling, self.guidance_scale)
        yield from candidate_steps(self.policy, self.sampler, self.reward, prompts, *settings, draws)

    def transition(self, batch: Any) -> Transition:
        """Return the distribution of the next latents of a batch, under the adapter that is active now."""
        return self.sampler.transition(batch.latents, self.prediction(batch), batch.timesteps)

    def prediction(self, batch: Any) -> Tensor:
        """Return the guided output of the network for the states of a batch, under the adapter that is active now."""
        conditioning, uncond = self.conditioning(batch.prompts)
        return self.policy.predict_guided(batch.latents, batch.timesteps, conditioning, uncond, self.guidance_scale)

    def advantages(self, rewards: Tensor, rule: Advantage, features: Tensor | None = None) -> Tensor:
        """Compute advantages ``(P, K)``, or ``(P, K, S)``, of this rank's rewards, among those of all ranks.

        Rewards are ``(P, K)`` of K samples of P prompts, ``(P, K, S)`` of S steps, or ``(P, K, R)`` for a rule that
        takes R rewards; features ``(P, K, F)``.
        """
        every = self.of_all_ranks(rewards)
        flat = every.flatten(0, 1)
        groups = torch.arange(len(every), device=every.device).repeat_interleave(every.shape[1])
        given = (self.of_all_ranks(features).flatten(0, 1),) if rule.takes_features and features is not None else ()
        advantages = rule(flat, groups, *given)
        return self.of_this_rank(advantages.unflatten(0, every.shape[:2]), len(rewards))

    def of_all_ranks(self, values: Tensor) -> Tensor:
        """Return the rows of ``values`` ``(P, ...)`` of all ranks, by rank."""
        return self.all_gather(values).reshape(-1, *values.shape[1:])

    def of_this_rank(self, every: Tensor, count: int) -> Tensor:
        """Return this rank's ``count`` rows of the rows of all ranks."""
        # With one process all_gather adds no axis, and the rows are all this rank's.
        start = self.trainer.global_rank * count if len(every) > count else 0
        return every[start : start + count]

    def optional_fields(self) -> set[str] | None:
        """Return the fields of the rows that are None with other settings and given with these; None checks nothing."""
        return None

    def check_experience(self, rows: SampledStates) -> None:
        """Raise InputError for a checkpoint's rows of another class, or with other fields than these settings need."""
        given = {field.name for field in fields(rows) if getattr(rows, field.name) is not None}
        always = {field.name for field in fields(rows) if field.default is MISSING}
        if type(rows) is not self.experience or self.optional_fields() not in (None, given - always):
            raise other_rows(type(rows).__name__, given)

    def rollout_settings(self) -> dict[str, Any]:
        """Return the settings that rows in store depend on, as plain values by the names of their fields."""
        sampling = {f"sampling.{name}": value for name, value in asdict(self.sampling).items()}
        return {**sampling, "guidance_scale": self.guidance_scale}

    def describe_rollouts(self) -> str:
        """Summarise the score gaps of the last rollout in one line, for the error of a run that keeps no rows."""
        statistics = self.rollout_statistics
        return gap_quantiles(
            () if statistics is None else zip(statistics.timesteps.tolist(), statistics.gap, strict=True)
        )

    @phase("rollout")
    def roll_out(self, prompts: PromptBatch) -> SampledStates | None:
        """Call :meth:`make_experience` in evaluation mode without gradients, with autocast, and measure its time.

        If a reward server fails (RemoteError), a rollout can be made again from the same state.
        """
        wall, process = time.perf_counter(), time.process_time()
        with self.sampling_context(), self.failing_together(), ExitStack() as shown:
            if self.rollout_progress is not None:
                batches = math.ceil(len(prompts) / (self.prompts_at_once or len(prompts)))
                progress = self.rollout_progress(self.sampling.num_inference_steps, batches)
                shown.enter_context(reporting_steps(shown.enter_context(progress).add))
            if self.reward is not None:
                self.reward.take_means()  # those of what was scored outside rollouts, such as by callbacks
            statistics = self.rollout_statistics
            try:
                found = self.make_experience(prompts)
            except RemoteError:
                self.rollout_statistics = statistics
                raise
            if self.reward is not None and (means := self.reward.take_means()) is not None:
                every = self.of_all_ranks(means[None].to(self.device, torch.float32))
                self.rollout_log.part_means = every.mean(dim=0).tolist()
        if found is not None:
            told = f"{type(self).__name__}.make_experience returned {type(found).__name__}"
            if type(found) is not self.experience:
                raise InputError(f"{told}; set experience to the class of the rows")
            if problem := wrong_rows(found):
                raise InputError(f"{told} with {problem}{place_of(type(self).make_experience)}")
        self.rollout_log.add_times(time.perf_counter() - wall, time.process_time() - process)
        return found

    def prepare_prompts(self, prompts: Sequence[str]) -> None:
        """Encode the prompts of the next batches, and keep the result in CPU memory in place of the previous one."""
        # All ranks encode the whole list: encoders that FSDP2 shards must be called equally often.
        with torch.no_grad(), self.compute_precision():
            self.policy.remember(prompts, self.guided)

    def conditioning(self, prompts: Sequence[str]) -> tuple[Conditioning, Conditioning | None]:
        """Return the encoded prompts and, under guidance, the encoded empty prompt; see :meth:`Policy.conditioning`."""
        return self.policy.conditioning(prompts, self.guided)


def same(found: Tensor | None, value: Tensor | None) -> bool:
    """Tell whether a buffer has a value, of its type and on its device."""
    if found is None or value is None:
        return found is value
    return (found.dtype, found.device) == (value.dtype, value.device) and torch.equal(found, value)


def restore(buffers: Sequence[HeldBuffer]) -> None:
    """Give buffers their values of before; a module may have put a new tensor in a buffer's place."""
    for part, name, buffer, value in buffers:
        part._buffers[name] = buffer if buffer is None or value is None else buffer.copy_(value)


def prompts_of(trainer: Trainer) -> tuple[str, ...]:
    """Return the prompts that the data list before the run; none for data that list none."""
    found = getattr(getattr(trainer, "datamodule", None), "prompts", ())
    found = getattr(found, "prompts", found)  # of prompts and images
    return found if isinstance(found, tuple) else ()
