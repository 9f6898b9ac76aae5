"""A reward that looks ahead, kept up with the policy that an alignment run changes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from latentreward.callbacks.resumed_settings import output_path
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed

from latentreward.alignment.modules.alignment import AlignmentModule
from latentreward.alignment.modules.look_ahead import LookAhead, Trains, check_record, look_ahead_states
from latentreward.alignment.rewards.look_ahead import RECORD, centred, seen_by, within_prompts
from latentreward.alignment.rollout.pruning import FinishedSamples
from latentreward.core.bootstrap import Interval
from latentreward.core.contracts import LookAheadStates, PromptBatch, join_rows, take_rows
from latentreward.core.errors import InputError, check_at_least_one, check_range
from latentreward.core.running import pair_generator
from latentreward.data.alignment.experience import as_plain, from_plain, of_all_ranks
from latentreward.reward.scoring.find import ModelSource


class RefreshLookAhead(Callback):
    """Callback that trains a reward to look ahead on the rollouts of an alignment run, whose labels are free.

    After every n-th rollout, and at the end of the run, the reward learns once from the states and ends of the rollouts
    since the last time. Before that, ρ is measured, the correlation of its scores with those of the finished samples
    within prompts; during the run it is logged as ``look_ahead/rho_STEPS``. The end of the run writes the model folder
    ``look_ahead`` beside the checkpoints. For methods that score finished samples; after another one, such as LPO,
    train :class:`~latentreward.alignment.LookAheadModule` on its checkpoint.

    Args:
        start: Stored latent reward that is trained on, best one that looks ahead for the policy of before the run.
        every_n_rollouts: Rollouts between two refreshes.
        record: Numbers of finished steps after which states are learned from; 0 is the noise.
        batch_size: Prompts of an optimiser step and rank, each with one recorded step.
        lr: Learning rate of AdamW.
        trains: ``own`` trains all that the stored reward holds itself, ``head`` the head alone.

    Example:
        ``--trainer.callbacks+=RefreshLookAhead --trainer.callbacks.start.path=runs/look_ahead``
    """

    def __init__(
        self,
        start: ModelSource,
        every_n_rollouts: int = 4,
        record: Sequence[int] = (0, 1, 2, 4),
        batch_size: int = 8,
        lr: float = 2e-4,
        trains: Trains = "own",
    ) -> None:
        check_at_least_one(every_n_rollouts=every_n_rollouts, batch_size=batch_size)
        check_range("(0, inf)", "1e-4 to 3e-4 is usual", lr=lr)
        self.start, self.record, self.every, self.batch_size = start, tuple(record), every_n_rollouts, batch_size
        self.lr, self.trains = lr, trains
        self.rollouts, self.refreshes = 0, 0
        self.rows: list[LookAheadStates] = []
        self.correlation: dict[int, Interval] = {}
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module whose rollouts score no finished samples, and have it keep the states of its samples."""
        rollout = getattr(pl_module, "rollout", None)
        if not isinstance(pl_module, AlignmentModule) or not isinstance(rollout, FinishedSamples):
            told = f"RefreshLookAhead: {type(pl_module).__name__} scores no finished samples in its rollouts"
            raise InputError(f"{told}; train LookAheadModule on its checkpoint")
        check_record(self.record, pl_module.sampling.num_inference_steps)
        rollout.record = self.record

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Load the reward; of a resumed run as it was."""
        self.ahead = LookAhead(self.start, pl_module.policy, self.trains).to(pl_module.device)
        self.trained = {name: one for name, one in self.ahead.named_parameters() if one.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), self.lr)
        if self._restored is not None:
            self.ahead.load_state_dict(self._restored["weights"], strict=False)
            self.optimizer.load_state_dict(self._restored["optimizer"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Take the states of a rollout that has just been made; after every n-th one, learn from them."""
        rollout: FinishedSamples = pl_module.rollout
        if not rollout.states:
            return
        states, rewards, names = torch.cat(rollout.states, dim=1), rollout.rewards, rollout.samples
        rollout.states = []
        prompts = PromptBatch(names.prompts[:: rollout.count], names.keys[:: rollout.count])
        times, scores = pl_module.sampler.timesteps, rewards.flatten()
        self.rows += look_ahead_states(prompts, self.record, states, times, scores)
        self.rollouts += 1
        if self.rollouts % self.every == 0:
            with pl_module.compute_precision():
                self._refresh(pl_module)
            for step, one in self.correlation.items():
                pl_module.log(f"look_ahead/rho_{step}", one.value, rank_zero_only=True)

    def _refresh(self, pl_module: Any) -> None:
        """Measure what the reward foresees of rollouts that it has not seen, then learn from them; collective."""
        device, seed = pl_module.device, pl_module.seed
        joined = join_rows(self.rows)
        self.ahead.remember([*dict.fromkeys(joined.prompts)])
        with torch.no_grad():
            own = [(self._predicted(row, device), row.scores) for row in self.rows]
        every = [pair for rank in of_all_ranks([(one.cpu(), two) for one, two in own]) for pair in rank]
        for number, step in enumerate(self.record):
            pairs = zip(*every[number :: len(self.record)], strict=True)
            self.correlation[step] = within_prompts(*map(torch.cat, pairs))
        spread = centred(torch.cat([two for _, two in every[:: len(self.record)]])).std(correction=0)
        rows = replace(joined, spread=spread.expand(len(joined)))
        order = torch.randperm(len(rows), generator=pair_generator(seed, "look ahead", self.refreshes, ""))
        for part in order.split(self.batch_size):
            batch = take_rows(rows, part.tolist()).to(device)
            with torch.enable_grad():
                self.ahead.loss(self._predicted(batch, device), batch).backward()
            self._average_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.refreshes += 1
        self.rows = []

    def _predicted(self, row: LookAheadStates, device: torch.device) -> Tensor:
        found: Tensor = self.ahead(row.prompts, row.latents.to(device), row.timesteps.to(device))
        return found

    def _average_gradients(self) -> None:
        """Average the gradients of all ranks, which have equally many rows."""
        if distributed.is_available() and distributed.is_initialized():
            for weight in self.trained.values():
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                distributed.all_reduce(gradient)
                weight.grad = gradient / distributed.get_world_size()

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Learn from the last rollouts, and write the reward for the policy that the run leaves."""
        if not hasattr(self, "ahead"):  # a run that had ended before it was resumed
            return
        if self.rows:
            with pl_module.compute_precision():
                self._refresh(pl_module)
        folder = output_path(trainer, RECORD)
        if trainer.is_global_zero:
            record = seen_by(pl_module.policy, pl_module.sampling, pl_module.guidance_scale)
            record["correlation"] = {str(step): list(one[:3]) for step, one in self.correlation.items()}
            self.ahead.save(folder, record)

    def state_dict(self) -> dict[str, Any]:
        """Return the trained weights, the optimiser's state, and the rows that are still to be learned from."""
        weights = {name: one.detach().cpu() for name, one in getattr(self, "trained", {}).items()}
        optimizer = self.optimizer.state_dict() if weights else {}
        counts = {"rollouts": self.rollouts, "refreshes": self.refreshes, "record": self.record}
        counts["correlation"] = {step: tuple(one) for step, one in self.correlation.items()}
        return {"weights": weights, "optimizer": optimizer, "rows": [as_plain(row) for row in self.rows], **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._restored = state_dict if state_dict["weights"] else None
        self.correlation = {step: Interval(*one) for step, one in state_dict["correlation"].items()}
        if state_dict["record"] == self.record:  # rows of other steps would be taken for those of these
            self.rows = [from_plain(row, LookAheadStates) for row in state_dict["rows"]]
        self.rollouts, self.refreshes = state_dict["rollouts"], state_dict["refreshes"]
