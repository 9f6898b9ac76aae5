"""Callback that measures how much of a picture an editor changes."""

from collections.abc import Sequence
from typing import Any

import torch
from latentreward.callbacks.prompt_monitor import PromptMonitor, log_now
from lightning.pytorch import Trainer

from latentreward.alignment import AlignmentModule
from latentreward.core.contracts import PathText, sources_of
from latentreward.core.errors import InputError, check_range
from latentreward.reward.metrics.unchanged import unchanged_region_change


class SourceChange(PromptMonitor):
    """Callback that logs how far an editor's results lie from the pictures that it edits.

    ``edits/change`` is the root mean square difference of the latents from those of the first picture.
    ``edits/unchanged_region`` is that of the ``share`` of the places that changed least, see
    :func:`~latentreward.reward.metrics.unchanged.unchanged_region_change`; a rise means that edits do more than they
    are asked to, which a reward can be hacked by. A fall of both to 0 means that pictures are no longer edited. Values
    of the reference are logged before the first step.

    Args:
        prompts: See :class:`~latentreward.callbacks.prompt_monitor.PromptMonitor`; each edits a picture.
        num_prompts: Prompts to take from the start of the list.
        every_n_steps: Optimiser steps between two measurements.
        share: Share of the places that an edit may be expected to leave alone.
        options: See :class:`~latentreward.callbacks.prompt_monitor.PromptMonitor`.

    Raises:
        InputError: If a setting is out of range, a prompt edits no picture, or the policy edits none.

    Example:
        ``--trainer.callbacks+=SourceChange --trainer.callbacks.prompts=edits.jsonl``
    """

    def __init__(
        self,
        prompts: Sequence[str] | PathText,
        num_prompts: int = 32,
        every_n_steps: int = 100,
        share: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(prompts, num_prompts, every_n_steps, **options)
        check_range("(0, 1]", **{"SourceChange.share": share})
        if (plain := next((prompt for prompt in self.prompts if not sources_of(prompt)), None)) is not None:
            raise InputError(
                f"SourceChange: the prompt {plain[:60]!r} edits no picture; give prompts with source_images"
            )
        self.region = share

    def begin(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        """Measure the reference."""
        self._measure(trainer, pl_module, reference=True)

    def look(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        """Measure the policy."""
        self._measure(trainer, pl_module, reference=False)

    def _measure(self, trainer: Trainer, pl_module: AlignmentModule, reference: bool) -> None:
        encoder, rows = pl_module.policy.source_encoder, []
        if encoder is None:
            raise InputError("SourceChange measures edits, but the policy makes pictures from text alone; leave it out")
        for batch, latents in self.latents(trainer, pl_module, reference):
            sampling = self.sampling_of(pl_module)
            with pl_module.policy.editing_at(sampling.height, sampling.width):
                source = encoder(batch.prompts)[0].to(latents)
            changes = [unchanged_region_change(latents, source, share) for share in (1.0, self.region)]
            rows.append(torch.stack(changes, dim=1))
        change, region = self.gather(trainer, torch.cat(rows)).flatten(0, 1).double().mean(dim=0).tolist()
        log_now(trainer, pl_module, {"edits/change": change, "edits/unchanged_region": region})
