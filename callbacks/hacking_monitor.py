"""Callback that detects a policy that exploits its reward instead of improving."""

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from latentreward.callbacks.checkpoints import LastCheckpoint
from latentreward.callbacks.graceful_stop import GracefulStop, checkpoint_path
from latentreward.callbacks.prompt_monitor import SEED, PromptMonitor, log_now
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from latentreward.alignment import AlignmentModule, begin_finished, check_sigmas
from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, check_choices, check_range
from latentreward.core.reports.drawing import to_image
from latentreward.reward import ImageScorer, RemoteError
from latentreward.reward.remote.client import raise_together

logger = logging.getLogger(__name__)


class HackingMonitor(PromptMonitor):
    """Callback that detects reward hacking: the reward rises while a held-out scorer falls, on fixed prompts.

    Both scores are measured on the reference's samples before training, and on the policy's samples every
    ``every_n_steps`` optimiser steps, from the same noise. Logs the means over prompts, ``hacking/held_out`` and
    ``hacking/reward``, and their differences from the reference in standard errors, paired over prompts,
    ``hacking/held_out_change`` and ``hacking/reward_change``. The policy counts as hacking its reward if its held-out
    score is more than ``tolerance`` standard errors below the reference's while its reward is above the reference's.
    For a method without a reward, the fall of the held-out score alone counts. Each reward of a mixture that
    normalises is divided by its standard deviation over the prompts in the reference's samples.

    Args:
        prompts: Fixed prompts, or a file of them.
        held_out: Image scorer that was trained on other pairs than the reward.
        num_prompts: Prompts to take from the start of the list, at least 2; use 32 or more to tell a change from noise.
        tolerance: Standard errors. Over many measurements, a policy that does not change falls below −2 by chance.
        action: ``stop`` saves a checkpoint, which ``--ckpt_path last`` finds, and ends the run; ``warn`` goes on.
        reward_sigmas: Noise levels at which a latent reward scores finished latents.
        options: See :class:`~latentreward.callbacks.prompt_monitor.PromptMonitor`; scores are averaged over the
            pictures of a prompt.

    Example:
        ``{class_path: HackingMonitor, init_args: {prompts: prompts.txt, held_out: {class_path: PickScorer}}}``
    """

    def __init__(
        self,
        prompts: Sequence[str] | PathText,
        held_out: ImageScorer,
        num_prompts: int = 32,
        tolerance: float = 3.0,
        action: Literal["stop", "warn"] = "stop",
        reward_sigmas: Sequence[float] = (0.4,),
        **options: Any,
    ) -> None:
        super().__init__(prompts, num_prompts, **options)
        if len(self.prompts) < 2:
            raise InputError("HackingMonitor needs at least 2 prompts; a single one gives no standard error")
        check_choices(HackingMonitor, action=action)
        check_range("(0, inf]", tolerance=tolerance)
        check_sigmas(reward_sigmas, "HackingMonitor.reward_sigmas")
        self.held_out, self.tolerance, self.action = held_out, tolerance, action
        self.reward_sigmas, self._start = tuple(reward_sigmas), torch.empty(0)

    def setup(self, trainer: Trainer, pl_module: object, stage: str) -> None:
        """Place this callback after those that change weights or checkpoint, before those that save checkpoints."""
        last = (Checkpoint, GracefulStop, type(self))
        callbacks = sorted(trainer.callbacks, key=lambda it: (isinstance(it, last), isinstance(it, last[:2])))  # type: ignore[attr-defined]
        trainer.callbacks = callbacks  # type: ignore[attr-defined]

    def begin(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        """Score the reference's samples, with which later samples are compared; clips are refused."""
        (self.sampling or pl_module.sampling).require_images("HackingMonitor")
        self.held_out.prepare()
        self._start = self._scores(trainer, pl_module, reference=True)

    def look(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        measured = (self._start, self._scores(trainer, pl_module, reference=False))
        columns = {"held_out": [scores[:, 0] for scores in measured]}
        if pl_module.reward is not None:
            spread = self._start[:, 1:].std(dim=0)
            columns["reward"] = [pl_module.reward.mix_apart(scores[:, 1:], spread) for scores in measured]
        names, changes = columns.keys(), [PairedChange(*scores) for scores in columns.values()]
        for name, change in zip(names, changes, strict=True):
            values = {f"hacking/{name}": change.after, f"hacking/{name}_change": change.in_standard_errors}
            log_now(trainer, pl_module, values)
        if changes[0].in_standard_errors < -self.tolerance and all(change.difference > 0 for change in changes[1:]):
            self._act(trainer, changes)

    def _act(self, trainer: Trainer, changes: "list[PairedChange]") -> None:
        figures = f"the held-out score of {self.held_out.name} {changes[0]}"
        if len(changes) > 1:
            figures += f", while the reward trained on {changes[1]}"
        message = f"optimiser step {trainer.global_step}: {figures}; the policy hacks its reward"
        if self.action == "stop":
            path = checkpoint_path(trainer)
            trainer.should_stop = True
            if not any(isinstance(keeper, LastCheckpoint) for keeper in trainer.checkpoint_callbacks):  # saves next
                trainer.save_checkpoint(path, weights_only=False)  # with None Lightning prints a line
            stops = "Stopped" if trainer.fit_loop._can_stop_early else "Stops at min_steps and min_epochs"
            message += f". {stops}, saved to {path}; use an earlier checkpoint, fewer steps or a lower learning rate"
        if trainer.is_global_zero:
            logger.warning(message)

    def _scores(self, trainer: Trainer, pl_module: AlignmentModule, reference: bool) -> Tensor:
        """Return ``(prompts, 1 + R)`` float64: held-out score, and those of the R rewards; means over pictures."""
        rows: list[Tensor] = []
        failure: RemoteError | None = None
        for batch, latents, pixels in self.pictures(trainer, pl_module, reference):
            if failure is None:  # else only sampled: a policy in shards samples on all ranks together
                try:
                    columns = [self.held_out(batch.prompts, list(map(to_image, pixels)))[:, None]]
                    if pl_module.reward is not None:
                        sampling = self.sampling or pl_module.sampling
                        with pl_module.policy.editing_at(sampling.height, sampling.width):
                            parts = begin_finished(pl_module.reward, latents, batch, SEED, self.reward_sigmas)()
                        columns.append(parts.cpu())
                    rows.append(torch.cat(columns, dim=1))
                except RemoteError as error:
                    failure = error
        raise_together(failure, trainer.strategy.reduce_boolean_decision)
        return self.gather(trainer, torch.cat(rows)).double().mean(dim=1)


class PairedChange:
    """Change of a mean over prompts, from scores ``(P,)`` before and after of the same P prompts.

    Attributes:
        after: Mean now.
        difference: Mean now minus that at the start.
        in_standard_errors: The difference in standard errors, paired over prompts; 0 without a difference, infinite if
            it is equal for all prompts.
    """

    def __init__(self, before: Tensor, after: Tensor) -> None:
        self.before, self.after, self.count = before.mean().item(), after.mean().item(), len(before)
        self.difference = self.after - self.before
        error = (after - before).std().item() / math.sqrt(self.count)
        self.in_standard_errors = self.difference / error if error else math.copysign(math.inf, self.difference)
        if not self.difference:
            self.in_standard_errors = 0.0

    def __str__(self) -> str:
        """Describe the change in words."""
        verb = "rose" if self.difference > 0 else "fell"
        by = f"{abs(self.in_standard_errors):.1f} standard errors over {self.count} prompts"
        size = abs(self.difference)  # the means may be equal in the digits that are shown
        return f"{verb} from {self.before:.4g} to {self.after:.4g}, by {size:.2g} ({by})"
