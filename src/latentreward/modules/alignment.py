"""What every way of aligning a policy shares: loading it, its optimiser, its checkpoints; no formula."""

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from latentreward.contracts import Conditioning, NoisyStates, PromptBatch, RolloutStatistics, StepPairs, StepSamples
from latentreward.errors import check_at_least_one
from latentreward.modules.based import BasedModule
from latentreward.modules.sharding import shard_policy, shard_reward
from latentreward.policies import PolicySource
from latentreward.policies.checkpoint import SOURCE
from latentreward.rewards import RewardSource
from latentreward.rollout import CandidateStep, RolloutDraws, Transition, candidate_steps, gap_quantiles

Experience = TypeVar("Experience", StepPairs, StepSamples)


class AlignmentModule(BasedModule):
    """A policy whose adapter trains.

    Args:
        policy: The generator.
        guidance_scale: Classifier-free guidance in sampling and in training; 1 switches it off.
        options: See :class:`~latentreward.modules.based.BasedModule`.

    Attributes:
        policy: The loaded :class:`~latentreward.policies.Policy`.
    """

    frozen_dtype = "policy.frozen_dtype"

    def __init__(self, policy: PolicySource, guidance_scale: float = 5.0, **options: Any) -> None:
        super().__init__(**options)
        check_at_least_one(guidance_scale=guidance_scale)
        self.policy_source, self.policy = policy, policy.load(self.seed)
        self.guidance_scale, self.based_on = guidance_scale, (self.policy, self.policy.source)

    def configure_model(self) -> None:
        """Under Lightning's ``ModelParallelStrategy``, share the weights out over the ranks; see :mod:`.sharding`."""
        if self.device_mesh is not None:
            shard_policy(self.policy, self.device_mesh["data_parallel"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note where the policy came from, so that the checkpoint alone makes it again."""
        checkpoint[SOURCE] = asdict(self.policy_source)
        checkpoint["base"] = self._base.record(())

    def encode_uncond(self) -> Conditioning | None:
        """The empty prompt, one row, if guidance asks for it."""
        return None if self.guidance_scale == 1.0 else self.policy.encode_uncond()


class RewardedModule(AlignmentModule):
    """A policy and a reward for its states.

    Latent spaces are compared from configs before any weight is loaded.

    Args:
        policy: See :class:`AlignmentModule`.
        reward: Scores states of the policy.
        options: See :class:`AlignmentModule`.

    Raises:
        InputError: If the reward takes latents of another space than the policy makes.
    """

    def __init__(self, policy: PolicySource, reward: RewardSource, **options: Any) -> None:
        reward.require_latents_of(policy)
        super().__init__(policy, **options)
        self.reward = reward.load(self.policy)

    def configure_model(self) -> None:
        """Share out the reward's own weights too."""
        super().configure_model()
        if self.device_mesh is not None:
            shard_reward(self.reward, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Have the reward score one random state at three noise levels, so that a faulty one shows at once.

        Statistics that a reward keeps of its scores are as before, so that a resumed run has them as it left them.
        The policy's network comes first: FSDP2 wants it called whole before a reward that shares it calls its parts.
        """
        super().on_fit_start()
        shape = self.policy.latent_shape()
        noise = torch.randn(3, *shape, generator=torch.Generator().manual_seed(self.seed)).to(self.device)
        levels = self.policy.noise_process.timesteps
        timesteps = levels[[0, len(levels) // 2, -1]].to(self.device)
        changing = [part for part in self.reward.modules() if getattr(part, "changes_buffers", False)]
        before = [(buffer, buffer.clone()) for part in changing for buffer in part.buffers(recurse=False)]
        with torch.no_grad(), self.compute_precision():
            self.policy.predict(noise, timesteps, self.policy.encode_prompts([""] * 3))
            encoded = self.reward.encode_prompts([""])
            self.reward(NoisyStates(noise, timesteps, torch.zeros(3, dtype=torch.int64), noise), encoded)
        for buffer, value in before:
            buffer.copy_(value)

    def compute_precision(self) -> AbstractContextManager[Any]:
        """The trainer's autocast, for work outside its steps."""
        return self.trainer.precision_plugin.forward_context()


class RolloutModule(RewardedModule, Generic[Experience]):
    """A policy that learns from its own rollouts.

    ``PromptDataModule`` calls :meth:`roll_out` whenever its store of rows has run dry, and hands the rows of all ranks
    out in batches, of equal size on every rank.

    Attributes:
        rollout_statistics: Of the last rollout, over all ranks once its first batch is there; callbacks may read them.
    """

    rollout_statistics: RolloutStatistics | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._began = self._rollout_seconds = 0.0
        self._times: dict[str, float] = {}
        self._rows: dict[str, int] = {}
        self._encoded: tuple[Conditioning, Conditioning | None] | None = None

    @abstractmethod
    def make_experience(self, prompts: PromptBatch) -> Experience | None:
        """Roll out this rank's ``prompts`` and return what is worth learning from, on the CPU; None if nothing is.

        It also sets :attr:`rollout_statistics`, on the CPU. :meth:`roll_out` calls it without gradients, in the
        trainer's precision and with dropout off, on all ranks at once with equally many prompts; under FSDP2 ranks
        must call networks equally often.
        """

    def candidate_steps(self, prompts: PromptBatch) -> Iterator[CandidateStep]:
        """Roll out and score candidates, for derived classes that set ``sampler``, ``sampling`` and ``candidates``."""
        draws = RolloutDraws(self.seed, prompts.keys)
        settings = (self.candidates, self.sampling, self.guidance_scale)
        yield from candidate_steps(self.policy, self.sampler, self.reward, prompts, *settings, draws)

    def transition(self, batch: Experience) -> Transition:
        """Distribution of the next states of a batch's states, under the network as it is switched now."""
        conditioning, uncond = self.conditioning(batch.prompts)
        output = self.policy.predict_guided(batch.latents, batch.timesteps, conditioning, uncond, self.guidance_scale)
        return self.sampler.transition(batch.latents, output, batch.timesteps)

    def describe_rollouts(self) -> str:
        """What the last rollout looked like, in one line: part of the message of a run that keeps nothing."""
        statistics = self.rollout_statistics
        return gap_quantiles(
            () if statistics is None else zip(statistics.timesteps.tolist(), statistics.gap, strict=True)
        )

    def roll_out(self, prompts: PromptBatch) -> Experience | None:
        """:meth:`make_experience` as it is promised; its time is measured."""
        wall, process = time.perf_counter(), time.process_time()
        with evaluating(self), torch.no_grad(), self.compute_precision():
            found = self.make_experience(prompts)
        seconds = time.perf_counter() - wall
        self._rollout_seconds += seconds
        self._times = {"seconds": seconds, "process_seconds": time.process_time() - process}
        return found

    def prepare_prompts(self, prompts: Sequence[str]) -> None:
        """Encode the distinct prompts that the next batches have; held in the host's memory.

        All ranks have the same prompts, which is what encoders that FSDP2 shares out need.
        """
        with torch.no_grad(), self.compute_precision():
            # One by one: last bits can depend on how many are encoded at once, and a resumed run has fewer left.
            parts = [self.policy.encode_prompts([prompt]).to("cpu") for prompt in prompts]
            uncond = self.encode_uncond()
        columns = [(part.prompt_embeds, part.pooled_prompt_embeds) for part in parts]
        self._rows = {prompt: row for row, prompt in enumerate(prompts)}
        self._encoded = Conditioning(*(torch.cat(column) for column in zip(*columns, strict=True))), uncond

    def conditioning(self, prompts: Sequence[str]) -> tuple[Conditioning, Conditioning | None]:
        """Encoded prompts and, if guidance asks for it, the empty one, on the module's device."""
        if self._encoded is None or not self._rows.keys() >= set(prompts):
            return self.policy.encode_prompts(prompts), self.encode_uncond()
        encoded, uncond = self._encoded
        return encoded.select([self._rows[prompt] for prompt in prompts]).to(self.device), uncond

    def on_train_start(self) -> None:
        """Start the clock against which rollouts are measured."""
        self._began, self._rollout_seconds = time.perf_counter(), 0.0

    def on_train_batch_start(self, batch: Experience, batch_idx: int) -> None:
        """Log the last rollout: its time and that of all so far, mean score and gap, and the share that was kept."""
        values = dict(self._times)
        if values:
            values["time_share"] = self._rollout_seconds / (time.perf_counter() - self._began)
        if (statistics := self.rollout_statistics) is not None and statistics.gap.numel():
            means = {"score": statistics.scores, "gap": statistics.gap, "kept_share": statistics.kept}
            values |= {name: value.float().mean().item() for name, value in means.items()}
        self.log_dict({f"rollout/{name}": value for name, value in values.items()}, batch_size=len(batch))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode; afterwards every part of it is in its own mode again."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
