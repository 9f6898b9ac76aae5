"""Callbacks that sample the policy at fixed prompts: pictures, and their change from reference or source."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentreward.callbacks.resumed_settings import output_path
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor

from latentreward.alignment import AlignmentModule, Sampling, sample_latents
from latentreward.alignment.rewards.unchanged import unchanged_region_change
from latentreward.core.contracts import PathText, PromptBatch, sources_of
from latentreward.core.errors import InputError, check_at_least_one, check_range
from latentreward.core.reports.drawing import PLAIN, draw_pair, strip, tile, to_image, to_images
from latentreward.core.running import evaluating, pair_generator
from latentreward.core.storage.durable import replacing
from latentreward.data.alignment.prompt_files import read_prompts

SEED = 0  # seed of the initial and the sampler's noise, equal in every run so that pictures of two runs can be compared


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
        """Measure the reference, so that settings that cannot work fail before training."""
        if not isinstance(pl_module, AlignmentModule):
            raise InputError(f"{type(self).__name__} watches the alignment of a policy, not {type(pl_module).__name__}")
        self._looked = trainer.global_step
        with evaluating(pl_module), torch.no_grad(), pl_module.compute_precision():
            self.begin(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Measure the policy if the batch ended with an optimiser step at which a measurement is due."""
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

    def sampling_of(self, pl_module: AlignmentModule) -> Sampling:
        """Return the settings of the sampler: own ones, or those of the module's rollouts."""
        return self.sampling or pl_module.sampling

    def latents(
        self, trainer: Trainer, pl_module: AlignmentModule, reference: bool
    ) -> Iterator[tuple[PromptBatch, Tensor]]:
        """Sample finished latents ``(B, C, ...)``, which must be finite, for each of this rank's batches."""
        sampling, policy = self.sampling_of(pl_module).with_noise(), pl_module.policy
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

    The picture is the image ``samples`` in TensorBoard and the file ``samples/step_{optimiser step}.png`` in the run's
    log folder, or in ``samples-v1`` if an earlier run wrote ``samples``.

    Args:
        prompts: See :class:`~latentreward.callbacks.prompt_monitor.PromptMonitor`.
        num_prompts: Prompts to take from the start of the list.
        image_size: Longer side of a drawn sample, in pixels.
        columns: Prompts side by side.
        options: See :class:`~latentreward.callbacks.prompt_monitor.PromptMonitor`.

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
        """Draw the reference's samples."""
        self._before = self._draw(trainer, pl_module, reference=True)

    def look(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        """Sample the fixed prompts now, and write one picture of all samples beside the reference's."""
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
    """Write a picture as the image ``name`` of this optimiser step to TensorBoard, and to a file."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(picture), trainer.global_step, dataformats="HWC")
    with replacing(path) as partial:
        picture.save(partial, "png")


def to_bytes(pixels: Tensor, size: int) -> Tensor:
    """Convert images or clips in [-1, 1] to bytes ``(B, h, w, 3)`` on the CPU, the longer side of a frame ``size``."""
    return torch.stack([torch.from_numpy(np.array(strip(to_images(one, size)))) for one in pixels])


class SourceChange(PromptMonitor):
    """Callback that logs how far an editor's results lie from the pictures that it edits.

    ``edits/change`` is the root mean square difference of the latents from those of the first picture.
    ``edits/unchanged_region`` is that of the ``share`` of the places that changed least, see
    :func:`~latentreward.alignment.rewards.unchanged.unchanged_region_change`; a rise means that edits do more than they
    are asked to, which a reward can be hacked by. A fall of both to 0 means that pictures are no longer edited. Values
    of the reference are logged before the first step.

    Args:
        prompts: See :class:`~latentreward.callbacks.prompt_monitor.PromptMonitor`; each edits a picture.
        num_prompts: Prompts to take from the start of the list.
        every_n_steps: Optimiser steps between two measurements.
        share: Share of the places that an edit may be expected to leave alone.
        options: See :class:`~latentreward.callbacks.prompt_monitor.PromptMonitor`.

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


class ReferenceDrift(PromptMonitor):
    """Callback that logs the mean squared difference between the predictions of policy and reference.

    The value at each noise level is logged as ``drift/sigma_{level}``. Both networks predict, without guidance, from
    the same noisy latents: samples of the reference for fixed prompts, with fixed noise added at each level. The drift
    is 0 at the start. ``drift/mean`` is the mean over levels; a sudden rise often comes before the pictures visibly
    change.

    Args:
        prompts: See :class:`~latentreward.callbacks.prompt_monitor.PromptMonitor`.
        num_prompts: Prompts to take from the start of the list.
        every_n_steps: Optimiser steps between two measurements.
        sigmas: Noise levels in (0, 1]; for each, the nearest level of the policy's noise process is used.
        options: See :class:`~latentreward.callbacks.prompt_monitor.PromptMonitor`; ``sampling`` is that of the
            reference's samples.

    Example:
        ``--trainer.callbacks+=ReferenceDrift --trainer.callbacks.prompts=prompts.txt``
    """

    def __init__(
        self,
        prompts: Sequence[str] | PathText,
        num_prompts: int = 8,
        every_n_steps: int = 100,
        sigmas: Sequence[float] = (0.2, 0.5, 0.8),
        **options: Any,
    ) -> None:
        super().__init__(prompts, num_prompts, every_n_steps, images_per_prompt=1, **options)
        if not sigmas or len(set(sigmas)) < len(sigmas) or not all(0.0 < sigma <= 1.0 for sigma in sigmas):
            raise InputError(
                f"sigmas={tuple(sigmas)} of ReferenceDrift must be one or more levels in (0, 1], each once"
            )
        self.sigmas = tuple(sigmas)
        self._states: list[tuple[PromptBatch, Tensor, Tensor, Tensor]] = []

    def begin(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        """Make the noisy latents and the reference's predictions for them."""
        policy, self._states = pl_module.policy, []
        for batch, latents in self.latents(trainer, pl_module, reference=True):
            generators = [pair_generator(SEED, "drift noise", 0, key) for key in batch.keys]
            noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
            for timestep in policy.noise_process.timesteps_at(torch.tensor(self.sigmas)):
                timesteps = timestep.expand(len(batch)).to(latents.device)
                noisy = policy.noise_process.add_noise(latents.float(), noise.to(latents.device), timesteps)
                with policy.reference():
                    predicted = policy.predict(noisy, timesteps, policy.encode_prompts(batch.prompts))
                # On the CPU: the states wait for hours and would take the memory of training.
                self._states.append((batch, timesteps.cpu(), noisy.cpu(), predicted.float().cpu()))

    def look(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        """Log the difference of the policy's present predictions from the reference's."""
        policy, device = pl_module.policy, pl_module.device
        errors: list[list[Tensor]] = [[] for _ in self.sigmas]
        for index, (batch, timesteps, noisy, reference) in enumerate(self._states):
            now = policy.predict(noisy.to(device), timesteps.to(device), policy.encode_prompts(batch.prompts))
            error = (now.float() - reference.to(device)).square().flatten(1).mean(dim=1)
            errors[index % len(self.sigmas)].append(error)
        rows = torch.stack([torch.cat(level) for level in errors], dim=1)
        drifts = self.gather(trainer, rows).flatten(0, 1).mean(dim=0)
        values = {f"drift/sigma_{sigma:g}": drift for sigma, drift in zip(self.sigmas, drifts.tolist(), strict=True)}
        log_now(trainer, pl_module, {**values, "drift/mean": drifts.mean().item()})
