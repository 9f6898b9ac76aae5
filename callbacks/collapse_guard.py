"""Callback that detects a policy whose samples become blank or all alike."""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from latentreward.callbacks.prompt_monitor import PromptMonitor, log_now
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from latentreward.alignment import AlignmentModule
from latentreward.core.contracts import PathText, RolloutStatistics
from latentreward.core.errors import InputError, check_choices, check_range

logger = logging.getLogger(__name__)

FLAT = 0.02  # standard deviation of pixels in [-1, 1] below which a picture counts as blank: about 3 of 256 grey levels


class CollapseGuard(PromptMonitor):
    """Callback that ends a run, or warns, when the policy's samples become blank or all alike.

    Each measurement samples fixed prompts, and compares three logged values with the reference's from the same noise:

    - ``collapse/contrast``: standard deviation over the pixels of a picture, averaged over pictures;
    - ``collapse/diversity``: standard deviation of a pixel over the pictures of one prompt (root mean square);
    - ``collapse/not_flat``: share of pictures that are not of a single colour (all black, for example).

    For modules that learn from their own rollouts there is a fourth value, ``collapse/score_spread``: the standard
    deviation of the rewards among the candidates of one prompt in the last rollout. It is compared with the first
    rollout's. If all candidates score alike, the policy has nothing left to learn from. Samples that are not finite
    end the run under either ``action``.

    Args:
        least: Fraction of its first value, in (0, 1), below which a value counts as collapsed.
        action: ``stop`` raises InputError, and earlier checkpoints stay; ``warn`` logs a warning and goes on.
        images_per_prompt: Pictures per prompt, at least 2.
        options: See :class:`~latentreward.callbacks.prompt_monitor.PromptMonitor`.

    Example:
        ``--trainer.callbacks+=CollapseGuard --trainer.callbacks.prompts=prompts.txt``
    """

    def __init__(
        self,
        prompts: Sequence[str] | PathText,
        num_prompts: int = 8,
        least: float = 0.3,
        action: Literal["stop", "warn"] = "stop",
        images_per_prompt: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(prompts, num_prompts, images_per_prompt=images_per_prompt, **options)
        check_range("[2, inf)", "CollapseGuard compares them", images_per_prompt=images_per_prompt)
        check_choices(CollapseGuard, action=action)
        check_range("(0, 1)", least=least)
        self.least, self.action = least, action
        self._start: dict[str, float] = {}
        self._first_spread: float | None = None

    def begin(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        self._start = self._measure(trainer, pl_module, reference=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._first_spread is None:
            self._first_spread = score_spread(pl_module)

    def look(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        now, start = self._measure(trainer, pl_module, reference=False), dict(self._start)
        spread = score_spread(pl_module)
        if spread is not None and self._first_spread is not None:
            now["score_spread"], start["score_spread"] = spread, self._first_spread
        log_now(trainer, pl_module, {f"collapse/{name}": value for name, value in now.items()})
        problems = [
            f"{name.replace('_', ' ')} is {value:.3g}, against {start[name]:.3g} at first"
            for name, value in now.items()
            if value < self.least * start[name]
        ]
        if not problems:
            return
        message = f"optimiser step {trainer.global_step}: {', '.join(problems)}"
        if self.action == "stop":
            raise InputError(
                f"{message}: the policy collapses; go back to an earlier checkpoint, with a lower learning rate or a "
                "greater kl_weight"
            )
        if trainer.is_global_zero:
            logger.warning(message)

    def state_dict(self) -> dict[str, Any]:
        return {"first_spread": self._first_spread}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first_spread = state_dict["first_spread"]

    def _measure(self, trainer: Trainer, pl_module: AlignmentModule, reference: bool) -> dict[str, float]:
        pixels = [made.clamp(-1, 1) for _, _, made in self.pictures(trainer, pl_module, reference)]
        # In half precision: pictures of all ranks travel, and 11 bits are more than a picture has.
        return collapse_figures(self.gather(trainer, torch.cat(pixels).half()).float())


def score_spread(pl_module: LightningModule) -> float | None:
    """Return the last rollout's standard deviation of scores among one prompt's candidates, averaged over prompts.

    None without a rollout.
    """
    statistics: RolloutStatistics | None = getattr(pl_module, "rollout_statistics", None)
    if statistics is None or not statistics.scores.numel():
        return None
    return statistics.scores.float().std(dim=1).mean().item()


def collapse_figures(pixels: Tensor) -> dict[str, float]:
    """Compute contrast, diversity and share of non-blank pictures from pixels ``(P, images, 3, H, W)`` in [-1, 1]."""
    contrast = pixels.flatten(2).std(dim=2)
    return {
        "contrast": contrast.mean().item(),
        "diversity": pixels.var(dim=1).mean().sqrt().item(),
        "not_flat": (contrast > FLAT).float().mean().item(),
    }
