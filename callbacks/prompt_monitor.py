"""Callbacks that sample the policy at fixed prompts: pictures, blank or equal ones, and exploits of the reward."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from latentreward.callbacks.checkpoints import LastCheckpoint
from latentreward.callbacks.graceful_stop import GracefulStop, checkpoint_path
from latentreward.callbacks.resumed_settings import output_path
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from latentreward.alignment import AlignmentModule, Sampling, begin_finished, check_sigmas, sample_latents
from latentreward.core.contracts import PathText, PromptBatch, sources_of
from latentreward.core.errors import InputError, check_at_least_one, check_choices, check_range
from latentreward.core.reports.drawing import PLAIN, draw_pair, strip, tile, to_image, to_images
from latentreward.core.running import evaluating
from latentreward.core.storage.durable import replacing
from latentreward.data.alignment.prompt_files import read_prompts
from latentreward.reward import ImageScorer, RemoteError
from latentreward.reward.remote.client import raise_together

logger = logging.getLogger(__name__)

SEED = 0  # seed of the initial and the sampler's noise, equal in every run so that pictures of two runs can be compared

FLAT = 0.02  # standard deviation of pixels in [-1, 1] below which a picture counts as blank: about 3 of 256 grey levels


class PromptMonitor(Callback, ABC):
    """Base class of callbacks that measure a policy every N optimiser steps, on the same prompts and noise.

    The prompts are split over the ranks; all ranks take part and get the same result. A sample depends only on its
    prompt and on the prompt's index in the list. After a measurement, also one that raised, training modes, adapters
    and gradients are as before. Global generators are not used, so a run with a monitor ends with the same weights as
    a run without.

    Args:
        prompts: Fixed prompts, or a file of them (formats of ``PromptDataModule``).
        num_prompts: Prompts to take from the start of the list.
        every_n_steps: Optimiser steps between two measurements.
        images_per_prompt: Pictures per prompt, each from its own noise.
        batch_size: Pictures that a rank samples, decodes or scores at once.
        sampling: Sampler settings; None takes those of the module's rollouts. An ``eta`` or ``noise_level`` of None is
            that of rollouts: 1 and 0.7.
    """

    def __init__(
        self,
        prompts: Sequence[str] | PathText,
        num_prompts: int,
        every_n_steps: int = 500,
        images_per_prompt: int = 1,
        batch_size: int = 8,
        sampling: Sampling | None = None,
    ) -> None:
        name = type(self).__name__
        numbers = {"num_prompts": num_prompts, "every_n_steps": every_n_steps}
        check_at_least_one(f"{name}.", **numbers, images_per_prompt=images_per_prompt, batch_size=batch_size)
        texts = read_prompts(prompts, f"{name}.prompts") if isinstance(prompts, str) else tuple(prompts)
        if not texts:
            raise InputError(f"prompts of {name} is empty; give prompts, or a file of them")
        self.prompts = texts[:num_prompts]
        self.every_n_steps, self.batch_size, self.sampling = every_n_steps, batch_size, sampling
        self.images_per_prompt = images_per_prompt
        self._looked = 0

    @abstractmethod
    def begin(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        """Measure the reference before the first step, and again when a run is resumed, for later comparison."""

    @abstractmethod
    def look(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        """Measure the policy; called every ``every_n_steps`` optimiser steps."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, AlignmentModule):
            raise InputError(f"{type(self).__name__} watches the alignment of a policy, not {type(pl_module).__name__}")
        self._looked = trainer.global_step
        with evaluating(pl_module), torch.no_grad(), pl_module.compute_precision():
            self.begin(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, AlignmentModule)
        before, self._looked = self._looked, trainer.global_step
        if before // self.every_n_steps != self._looked // self.every_n_steps:
            with evaluating(pl_module), torch.no_grad(), pl_module.compute_precision():
                self.look(trainer, pl_module)

    def share(self, trainer: Trainer) -> list[PromptBatch]:
        """Return this rank's prompts in batches; ranks with fewer repeat some, so that all have equally many."""
        count, world = len(self.prompts) * self.images_per_prompt, trainer.world_size
        mine = [(trainer.global_rank + world * turn) % count for turn in range(-(-count // world))]
        prompts = tuple(self.prompts[picture // self.images_per_prompt] for picture in mine)
        keys = tuple(f"{picture // self.images_per_prompt}-{picture % self.images_per_prompt}" for picture in mine)
        return PromptBatch(prompts, keys).split(self.batch_size)

    def latents(
        self, trainer: Trainer, pl_module: AlignmentModule, reference: bool
    ) -> Iterator[tuple[PromptBatch, Tensor]]:
        """Sample finished latents ``(B, C, ...)``, which must be finite, for each of this rank's batches."""
        sampling, policy = (self.sampling or pl_module.sampling).with_noise(), pl_module.policy
        for batch in self.share(trainer):
            with policy.editing_at(sampling.height, sampling.width):
                made = sample_latents(policy, batch, sampling, pl_module.guidance_scale, SEED, reference)
            broken = ~made.isfinite().flatten(1).all(dim=1)
            if broken.any():
                prompt = batch.prompts[int(broken.nonzero()[0])]
                raise InputError(
                    f"optimiser step {trainer.global_step}: latents sampled for {prompt[:60]!r} are not finite; go "
                    "back to an earlier checkpoint, with a lower learning rate or precision 32-true"
                )
            yield batch, made

    def pictures(
        self, trainer: Trainer, pl_module: AlignmentModule, reference: bool
    ) -> Iterator[tuple[PromptBatch, Tensor, Tensor]]:
        """Sample this rank's batches: prompts, latents ``(B, C, ...)`` and pixels ``(B, 3, ...)``, about [-1, 1]."""
        vae = pl_module.policy.vae
        if vae is None:
            raise InputError(f"{type(self).__name__} needs the policy's VAE; load it from a full pipeline folder")
        for batch, latents in self.latents(trainer, pl_module, reference):
            yield batch, latents, vae.decode(latents)

    def gather(self, trainer: Trainer, rows: Tensor) -> Tensor:
        """Collect ``rows``, one per picture, from all ranks: ``(P, images, ...)`` in the order of the prompts."""
        if trainer.world_size > 1:
            shares = trainer.strategy.all_gather(rows.to(trainer.strategy.root_device))
            rows = shares.transpose(0, 1).flatten(0, 1)
        count = len(self.prompts) * self.images_per_prompt
        return rows[:count].unflatten(0, (len(self.prompts), self.images_per_prompt)).cpu()


def log_now(trainer: Trainer, pl_module: LightningModule, values: Mapping[str, float]) -> None:
    """Log at this very step, whatever ``log_every_n_steps`` is; ``ModelCheckpoint`` can monitor the values.

    All ranks must pass equal values. At the start of training only the loggers get the values.
    """
    if pl_module._current_fx_name == "on_train_batch_end":
        pl_module.log_dict(dict(values), logger=False)
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step)


class SampleGrid(PromptMonitor):
    """Callback that draws the policy's samples for fixed prompts beside the reference's from the same noise.

    Beside edits the pictures that were edited are drawn. Of clips, four frames are drawn.

    The picture is the image ``samples`` in TensorBoard and Weights & Biases, and the file
    ``samples/step_{optimiser step}.png`` in the run's log folder, or in ``samples-v1`` after an earlier run.

    Args:
        image_size: Longer side of a drawn sample, in pixels.
        columns: Prompts side by side.

    Example:
        ``--trainer.callbacks+=SampleGrid --trainer.callbacks.prompts=prompts.txt``
    """

    output_name = "samples"

    def __init__(
        self,
        prompts: Sequence[str] | PathText,
        num_prompts: int = 9,
        image_size: int = 128,
        columns: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(prompts, num_prompts, images_per_prompt=1, **options)
        check_at_least_one("SampleGrid.", image_size=image_size, columns=columns)
        self.image_size, self.columns = image_size, columns
        self._before: list[Image.Image] = []

    def begin(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        self._before = self._draw(trainer, pl_module, reference=True)

    def look(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        folder = output_path(trainer, self.output_name)  # a collective call
        # All ranks sample, and rank 0 alone draws.
        after = self._draw(trainer, pl_module, reference=False)
        if not trainer.is_global_zero:
            return
        captions = ("before", f"step {trainer.global_step}")
        cells = []
        for *pair, prompt in zip(self._before, after, self.prompts, strict=True):
            encoder = pl_module.policy.source_encoder
            sources = [] if encoder is None else [encoder.pixels(source) for source in sources_of(prompt)]
            shown = [*(to_image(pixels, self.image_size) for pixels in sources), *pair]
            cells.append(draw_pair(shown, ["source"] * len(sources) + [*captions], prompt, PLAIN))
        picture = tile(cells, self.columns)
        show(trainer, "samples", picture, folder / f"step_{trainer.global_step:06d}.png")

    def _draw(self, trainer: Trainer, pl_module: AlignmentModule, reference: bool) -> list[Image.Image]:
        made = [to_bytes(pixels, self.image_size) for _, _, pixels in self.pictures(trainer, pl_module, reference)]
        return [Image.fromarray(array) for array in self.gather(trainer, torch.cat(made)).flatten(0, 1).numpy()]


def show(trainer: Trainer, name: str, picture: Image.Image, path: Path) -> None:
    """Write a picture as the image ``name`` of this optimiser step to TensorBoard or W&B, and to a file."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(picture), trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [picture], trainer.global_step)
    with replacing(path) as partial:
        picture.save(partial, "png")


def to_bytes(pixels: Tensor, size: int) -> Tensor:
    """Convert images or clips in [-1, 1] to bytes ``(B, h, w, 3)`` on the CPU, the longer side of a frame ``size``."""
    return torch.stack([torch.from_numpy(np.array(strip(to_images(one, size)))) for one in pixels])


class CollapseGuard(PromptMonitor):
    """Callback that ends a run, or warns, when the policy's samples become blank or all alike.

    Each measurement samples fixed prompts, and compares three logged values with the reference's from the same noise:

    - ``collapse/contrast``: standard deviation over the pixels of a picture, averaged over pictures;
    - ``collapse/diversity``: standard deviation of a pixel over the pictures of one prompt (root mean square);
    - ``collapse/not_flat``: share of pictures that are not of a single colour (all black, for example).

    Samples that are not finite end the run under either ``action``.

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

    def begin(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        self._start = self._measure(trainer, pl_module, reference=True)

    def look(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        now = self._measure(trainer, pl_module, reference=False)
        log_now(trainer, pl_module, {f"collapse/{name}": value for name, value in now.items()})
        problems = [
            f"{name.replace('_', ' ')} is {value:.3g}, against {self._start[name]:.3g} at first"
            for name, value in now.items()
            if value < self.least * self._start[name]
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

    def _measure(self, trainer: Trainer, pl_module: AlignmentModule, reference: bool) -> dict[str, float]:
        pixels = [made.clamp(-1, 1) for _, _, made in self.pictures(trainer, pl_module, reference)]
        # In half precision: pictures of all ranks travel, and 11 bits are more than a picture has.
        return collapse_figures(self.gather(trainer, torch.cat(pixels).half()).float())


def collapse_figures(pixels: Tensor) -> dict[str, float]:
    """Compute contrast, diversity and share of non-blank pictures from pixels ``(P, images, 3, H, W)`` in [-1, 1]."""
    contrast = pixels.flatten(2).std(dim=2)
    return {
        "contrast": contrast.mean().item(),
        "diversity": pixels.var(dim=1).mean().sqrt().item(),
        "not_flat": (contrast > FLAT).float().mean().item(),
    }


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
