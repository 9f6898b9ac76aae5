"""The reward model that users load, score images and latents with, and save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from latentreward.core.contracts import Conditioning, check_sources
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.core.running import find_device
from latentreward.reward.scoring.batched_scoring import (
    ImageInput,
    Images,
    PromptMemory,
    as_images,
    check_floating,
    check_frames,
    doubts_of_pixels,
    prompt_of_each,
    score_given_latents,
    score_given_states,
    score_images,
)
from latentreward.reward.scoring.network import RewardNetwork
from latentreward.reward.scoring.scoring_noise import ScoringNoise, check_noise

if TYPE_CHECKING:
    from latentreward.reward.scoring.layouts.card import Card
    from latentreward.reward.scoring.layouts.find import ModelSource

MOSTLY_NOISE, WIDEST_NOISE = 0.9, 3.0
"""Noise level from which states have about the spread of noise, and the largest such spread without a warning."""


class RewardModel(RewardNetwork):
    """Reward model that scores images or latents for prompts; see :class:`RewardNetwork` for its attributes.

    Scores are computed at the model's noise levels (attribute ``noise``) or at given ones.
    """

    @classmethod
    def of(cls, network: RewardNetwork) -> Self:
        """Build a reward model from a network, such as a training module's; the two share all parts and settings."""
        model = cls.__new__(cls)  # whose constructor would put the defaults in place of the network's settings
        vars(model).update(vars(network), _warned=set())
        return model

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | ModelSource,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Self:
        """Load a reward model, frozen and in evaluation mode.

        Args:
            source: Path or hub id of the model, as for :class:`~latentreward.reward.ModelSource`, or that record.
            device: Device of the model, e.g. ``cuda``; ``auto`` takes an accelerator if there is one.
            dtype: Precision of the backbone; head and scores are always float32.
            options: ``config``, ``base``, ``revision``, ``trust_remote_code`` and ``published``: see
                :class:`~latentreward.reward.ModelSource`. Values of ``published`` in use are logged, and appear in
                :attr:`published` and :attr:`identity`.

        Raises:
            InputError: If a file is missing or damaged, weights do not fit, the hub cannot provide the files, or the
                device does not exist.
        """
        from latentreward.reward.scoring.layouts.find import ModelSource, find_reward

        target = find_device(device)
        source = source if isinstance(source, ModelSource) else ModelSource(str(source), **options)
        model = find_reward(source).load(cls).to(target).set_precision(dtype)
        model.source = str(source)
        return model

    def save_pretrained(self, folder: str | Path, card: Card | None = None, *, base: str | None = None) -> None:
        """Write the trained weights, settings and model card into a folder that :meth:`from_pretrained` loads.

        The loaded model gives bitwise equal scores. The folder is written under a temporary name and renamed when it is
        complete. Its files are described in :mod:`~latentreward.reward.scoring.layouts.model_folder`.

        Args:
            folder: Folder to create. An empty folder or a model folder of that name is replaced.
            card: Contents of the model card that the model itself does not know, e.g. the licence.
            base: Name under which others find the pretrained pipeline, e.g. a hub id (``owner/name@revision``). None
                keeps the hub id, or takes the last part of a local path; whoever loads the model must then pass
                ``base=`` a local copy.

        Raises:
            InputError: If the model cannot be rebuilt from files, has no VAE or no text encoder, was loaded in
                bfloat16, or has weights that are not finite; or if ``folder`` holds anything but a model.
        """
        from latentreward.reward.scoring.layouts.card import Card
        from latentreward.reward.scoring.layouts.saving import new_folder, write_model

        with new_folder(Path(folder)) as partial:
            write_model(self, partial, card or Card(), base, Path(folder).resolve().name)

    def push_to_hub(self, repo_id: str, card: Card | None = None, *, base: str | None = None, **options: Any) -> str:
        """Upload the files that :meth:`save_pretrained` writes to the hub as one commit; return the commit's URL.

        Args:
            repo_id: ``owner/name``; the repository is created if it does not exist.
            card: See :meth:`save_pretrained`.
            base: See :meth:`save_pretrained`.
            options: ``private``, ``token``, ``revision`` and ``commit_message``: see
                :func:`~latentreward.reward.scoring.layouts.find.upload`.

        Raises:
            InputError: As :meth:`save_pretrained`, or if the hub does not answer or rejects the upload.
        """
        from latentreward.reward.scoring.layouts.card import Card
        from latentreward.reward.scoring.layouts.find import upload

        card = card or Card()
        with TemporaryDirectory() as place:
            folder = Path(place) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder, replace(card, name=card.name or repo_id), base=base)
            return upload(folder, repo_id, **options)

    def score(
        self,
        prompts: str | Sequence[str],
        images: ImageInput | Images,
        *,
        noise: ScoringNoise | None = None,
        batch_size: int = 8,
        value_range: tuple[float, float] | None = None,
        axes: bool = False,
        memory: PromptMemory | None = None,
    ) -> Tensor:
        """Score N images, image i for prompt i; returns ``(N,)``, float32 on the CPU.

        A score depends on the rest of the batch and on the order of images only by rounding (about 2e-5 on a CPU in
        float32; bitwise equal in batches of equal shape). Prompts are encoded one at a time, and the noise is seeded
        with prompt, seed, noise level and shape of the latents. Gradients flow back if ``images`` is a tensor that
        requires a gradient. Empty lists give an empty tensor.

        A warning is logged, once per model and kind, for a tensor whose values all lie in [0, 1] or whose size differs
        from the training size, for images whose aspect ratio fits none of the model's buckets, and for empty prompts.

        Args:
            prompts: N prompts, or a single text for all images. Of edits, prompts with the pictures that were edited,
                as :func:`~latentreward.reward.edit_prompt` makes them.
            images: N images of any size: PIL images of any mode, paths, encoded bytes, ``ImageRef`` or uint8 arrays
                ``(H, W, 3)``, also as one array ``(N, H, W, 3)``. Their EXIF orientation is applied if ``exif`` is
                ``apply``, and ``image_sizes`` resizes each. Or a floating point tensor ``(N, 3, H, W)``, which is
                scored at its own size; for a model trained on clips ``(N, 3, F, H, W)``. A single image (``(3, H, W)``
                as a tensor) gives one score, ``(1,)``.
            noise: Noise levels and seeds; None takes those of the model.
            batch_size: Largest number of images per forward pass; a batch holds images of one size.
            value_range: Lowest and highest value of a tensor's pixels, e.g. ``(0, 1)``. None takes (-1, 1) and warns if
                all values lie in [0, 1].
            axes: Whether to return fidelity and aesthetics, with a last axis of 2, in place of their weighted sum; only
                for a model whose head has these two outputs.
            memory: Encoded prompts of earlier calls, made by :meth:`prompt_memory`; None keeps none between calls.

        Raises:
            InputError: If the numbers of prompts and images differ, an image cannot be read, or a score is not finite.
        """
        options: dict[str, Any] = {"batch_size": batch_size, "value_range": value_range, "axes": axes, "memory": memory}
        return self.score_levels(prompts, images, [self.noise if noise is None else noise], **options)[:, 0]

    def score_levels(
        self,
        prompts: str | Sequence[str],
        images: ImageInput | Images,
        levels: Sequence[ScoringNoise],
        *,
        batch_size: int = 8,
        value_range: tuple[float, float] | None = None,
        axes: bool = False,
        memory: PromptMemory | None = None,
    ) -> Tensor:
        """Score N images under each of K noise settings; returns ``(N, K)``, float32 on the CPU.

        Each image is encoded only once for all settings. Without images the result is empty, ``(0, K)``.

        Arguments are those of :meth:`score`, with K settings ``levels``; ``axes`` gives ``(N, K, 2)``.

        Raises:
            InputError: As in :meth:`score`, or if ``levels`` is empty.
        """
        if isinstance(levels, ScoringNoise) or not levels:
            raise InputError(f"levels is {levels!r}; give a list of at least one ScoringNoise")
        for noise in levels:
            check_noise(noise)
        check_at_least_one(batch_size=batch_size)
        self._check_axes(axes)
        given = as_images(images, value_range)
        texts = prompt_of_each(prompts, len(given))
        check_frames(given, self.image_sizes, self.backbone.latent_space)
        if isinstance(given, Tensor):
            for kind, doubt in doubts_of_pixels(given, self.image_sizes, value_range is not None).items():
                self.warn_once(kind, doubt)
        self._check_prompts(texts)
        outputs = score_images(self, texts, given, levels, batch_size, memory)
        return outputs if axes else self.head.total(outputs)

    def _check_axes(self, axes: bool) -> None:
        if axes and not self.axes:
            raise InputError(f"axes=True, but {type(self.head).__name__} has no two axes; train it with `axes` set")

    def _check_prompts(self, prompts: Sequence[str]) -> None:
        check_sources(f"reward {self.source}".strip(), prompts, self.backbone.sources)
        if empty := sum(not prompt.strip() for prompt in prompts):
            text = "the score then says nothing of how well an image fits a text"
            self.warn_once("prompt", f"{empty} of {len(prompts)} prompts are empty; {text}")

    def score_latents(
        self,
        prompts: str | Sequence[str],
        latents: Tensor,
        *,
        noise: ScoringNoise | None = None,
        draws: Tensor | None = None,
        conditioning: tuple[Conditioning, Conditioning | None] | None = None,
        batch_size: int | None = None,
        axes: bool = False,
    ) -> Tensor:
        """Add noise to N clean latents and score them, latent i for prompt i; returns ``(N,)``, at least float32.

        Gradients flow back if ``latents`` requires a gradient; otherwise no autograd graph is built. No latents give an
        empty tensor.

        Args:
            prompts: N prompts, or a single text for all; with ``conditioning`` they only seed the noise.
            latents: ``(N, C, ...)`` clean, scaled latents of any spatial shape that the network takes.
            noise: Noise levels and seeds; None takes those of the model.
            draws: ``(N, C, ...)`` noise to add at every level in place of seeded noise, as the released DiNa-LRM does
                in an ensemble; zeros add no noise, and only the noise process's scale is applied.
            conditioning: N encoded prompts, and the encoded empty prompt in one row (with None it is encoded here if
                the head needs it).
            batch_size: Largest number of latents per forward pass; None takes all at once.
            axes: As in :meth:`score`.

        Raises:
            InputError: If numbers or shapes do not fit, a level lies outside the noise process, or a score is not
                finite.
        """
        check_at_least_one(batch_size=batch_size)
        self._check_axes(axes)
        if noise is not None:
            check_noise(noise)
        check_floating("latents", latents, 3, "(N, C, ...)")
        if draws is not None and draws.shape != latents.shape:
            shapes = f"{tuple(draws.shape)}, but latents {tuple(latents.shape)}"
            raise InputError(f"draws have shape {shapes}; give as many numbers as the latents have")
        texts = self._check_conditioning(prompts, len(latents), conditioning)
        size, noise = batch_size or max(len(latents), 1), noise or self.noise
        outputs = score_given_latents(self, texts, latents, noise, draws, conditioning, size)
        return outputs if axes else self.head.total(outputs)

    def score_states(
        self,
        prompts: str | Sequence[str],
        latents: Tensor,
        timesteps: Tensor,
        *,
        conditioning: tuple[Conditioning, Conditioning | None] | None = None,
        batch_size: int | None = None,
        axes: bool = False,
    ) -> Tensor:
        """Score the S noisy states of each of N trajectories, trajectory i for prompt i; no noise is added.

        Gradients flow back if ``latents`` requires a gradient; otherwise no autograd graph is built. A prompt is
        encoded once for all its states. No states give an empty tensor.

        Args:
            prompts: N prompts, or a single text for all; with ``conditioning`` they only name a state in messages.
            latents: ``(N, S, C, ...)`` scaled states of the model's own noise process; see
                :func:`~latentreward.alignment.rewards.latent.convert_states` for states of another.
            timesteps: ``(N, S)``, or ``(S,)`` for all trajectories, of the model's noise process; in flow matching
                1000 times the noise level.
            conditioning: N encoded prompts, and the encoded empty prompt in one row (with None it is encoded here if
                the head needs it).
            batch_size: Largest number of states per forward pass; None takes all at once.
            axes: As in :meth:`score`; the result has a last axis of 2.

        Returns:
            Scores ``(N, S)``, at least float32.

        Raises:
            InputError: If numbers or shapes do not fit, a timestep lies outside the noise process, or a score is not
                finite.
        """
        check_at_least_one(batch_size=batch_size)
        self._check_axes(axes)
        check_floating("latents", latents, 4, "(N, S, C, ...)")
        timesteps = torch.as_tensor(timesteps)
        count, steps = latents.shape[:2]
        if tuple(timesteps.shape) not in ((steps,), (count, steps)):
            given = f"timesteps have shape {tuple(timesteps.shape)} for {count} trajectories of {steps} states"
            raise InputError(f"{given}; give ({steps},) for all of them, or ({count}, {steps})")
        times = timesteps.to(torch.float32).expand(count, steps)
        sigmas = self.backbone.noise_process.sigma(times.flatten())  # raises for a timestep out of range
        if times.numel() and times.max() <= 1 and times.frac().any():
            doubt = "all timesteps lie in [0, 1], as noise levels do; in flow matching give 1000 times the level"
            self.warn_once("timesteps", doubt)
        noisy = latents.detach().flatten(0, 1)[sigmas.to(latents.device) >= MOSTLY_NOISE]
        if noisy.numel() and (spread := noisy.float().std().item()) > WIDEST_NOISE:
            self.warn_once(
                "states",
                f"states that are mostly noise have standard deviation {spread:.1f}, where this noise process has 1; "
                "divide states of diffusers' Euler schedulers (x + σ·ε) by √(σ² + 1), as their scale_model_input does",
            )
        texts = self._check_conditioning(prompts, count, conditioning)
        size = batch_size or max(count * steps, 1)
        outputs = score_given_states(self, texts, latents, times, conditioning, size)
        return outputs if axes else self.head.total(outputs)

    def _check_conditioning(
        self, prompts: str | Sequence[str], count: int, given: tuple[Conditioning, Conditioning | None] | None
    ) -> Sequence[str]:
        """Check prompts and their given encoded form, and return one prompt for each of ``count`` rows."""
        if given is not None and len(given[0]) != count:
            raise InputError(f"conditioning has {len(given[0])} rows for {count} latents; give one row for each")
        masked = getattr(self.backbone.text_encoder, "masked", False)
        if given is not None and given[0].prompt_mask is None and masked:
            raise InputError("conditioning has no prompt_mask; tell which tokens belong to each prompt")
        texts = prompt_of_each(prompts, count)
        if given is None:
            self._check_prompts(texts)
        return texts

    def prompt_memory(self, count: int) -> PromptMemory:
        """Return an empty memory of ``count`` encoded prompts, which stays valid while the text encoder is frozen.

        An encoded prompt of SD3 takes 5 MB on the model's device.
        """
        check_at_least_one(count=count)
        return PromptMemory(self, count)


def normalise_score(raw: Tensor) -> Tensor:
    """Convert raw scores to the scale on which DiNa-LRM reports them: ``(raw + 10) / 10``."""
    return (torch.as_tensor(raw) + 10) / 10
