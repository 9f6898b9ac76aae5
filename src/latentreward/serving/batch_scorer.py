"""Rows of requests, and scoring of batches of rows with a reward model."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentreward.contracts import Conditioning
from latentreward.errors import InputError
from latentreward.scoring import RewardModel
from latentreward.scoring.scoring_noise import ScoringNoise, draw_noise, timesteps_of

TOKENS = 64
"""Number of which the length of padded prompts is a multiple."""


@dataclass(frozen=True, eq=False)
class LatentRow:
    """Clean latents with an encoded prompt, all float32.

    Attributes:
        latents: ``(C, h, w)`` or ``(C, T, h, w)``, scaled.
        prompt_embeds: ``(L, D)``, without padding if ``masked``.
        pooled_prompt_embeds: ``(P,)``; None if the model takes none.
        u: Noise level in [0, 1].
        seed: Seed of the noise.
        prompt: Text that the noise also depends on; the network gets the embeddings only.
        masked: Whether the prompt is padded in a batch, with a mask.
    """

    latents: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None
    u: float
    seed: int
    prompt: str
    masked: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens in a batch, which for a padded prompt does not depend on the other rows."""
        count = len(self.prompt_embeds)
        return -(-count // TOKENS) * TOKENS if self.masked else count

    @property
    def shape(self) -> Hashable:
        """Key of rows that take the same time: shape of the latents, number of tokens."""
        return self.latents.shape, self.tokens

    @property
    def conditioning(self) -> Conditioning:
        """Encoded prompt in one row, padded for a batch."""
        pooled = self.pooled_prompt_embeds
        encoded = Conditioning(self.prompt_embeds[None], None if pooled is None else pooled[None])
        return encoded.padded(self.tokens) if self.masked else encoded

    @property
    def group(self) -> Hashable:
        """Key of rows that can share a batch: :attr:`shape` and noise level."""
        return self.shape, self.u


@dataclass(frozen=True, eq=False)
class ImageRow:
    """An image with its prompt.

    Attributes:
        prompt: Raw text.
        image: 8-bit RGB image.
    """

    prompt: str
    image: Image.Image

    @property
    def shape(self) -> Hashable:
        """Key of rows that take the same time: one for all images, which are resized to the model's size."""
        return "images"

    @property
    def group(self) -> Hashable:
        """Key of rows that can share a batch: one for all images."""
        return self.shape


@dataclass(frozen=True, eq=False)
class PromptedRow:
    """Clean latents with a raw prompt.

    Attributes:
        prompt: Raw text.
        latents: ``(C, h, w)`` or ``(C, T, h, w)``, scaled, float32.
        u: Noise level in [0, 1]; None takes the model's own levels and seeds.
        seed: Seed of the noise at ``u``.
    """

    prompt: str
    latents: Tensor
    u: float | None = None
    seed: int = 0

    @property
    def shape(self) -> Hashable:
        """Key of rows that take the same time: kind and shape of the latents, whether the levels are the model's."""
        return "prompted", self.latents.shape, self.u is None

    @property
    def group(self) -> Hashable:
        """Key of rows that can share a batch: :attr:`shape` and noise level."""
        return self.shape, self.u


@dataclass(frozen=True, eq=False)
class StateRow:
    """A noisy state of a trajectory with a raw prompt.

    Attributes:
        prompt: Raw text.
        latents: ``(C, h, w)`` or ``(C, T, h, w)``, scaled, float32.
        timestep: Timestep of the model's noise process.
    """

    prompt: str
    latents: Tensor
    timestep: float

    @property
    def shape(self) -> Hashable:
        """Key of rows that take the same time: kind and shape of the latents."""
        return "state", self.latents.shape

    @property
    def group(self) -> Hashable:
        """Key of rows that can share a batch: :attr:`shape`, at any timesteps."""
        return self.shape


AnyRow = LatentRow | ImageRow | PromptedRow | StateRow


class RowScorer:
    """Scorer of batches of rows with a reward model.

    All rows of a batch have one ``group``, which is an attribute of the rows: equal kinds, shapes and noise level.

    Args:
        reward: Reward model in evaluation mode.
        batch_size: Rows per forward pass.
        prompts_kept: Number of encoded prompts that are kept for later batches, at least ``batch_size``.
        observe: Function called for each batch with raw prompts with the numbers of those that were kept, and of those
            that are to be encoded.
    """

    def __init__(
        self,
        reward: RewardModel,
        batch_size: int,
        prompts_kept: int = 1,
        observe: Callable[[int, int], None] = lambda kept, encoded: None,
    ) -> None:
        self.reward, self.batch_size, self._observe = reward, batch_size, observe
        self._axes = bool(reward.axes)
        self._memory = reward.prompt_memory(max(prompts_kept, batch_size))

    def __call__(self, rows: Sequence[AnyRow]) -> list[tuple[float, ...]]:
        """Return the raw score of each row and, of a model with two axes, fidelity and aesthetics after it.

        The score of a row does not depend on other rows.

        Raises:
            InputError: If a score is not finite, or the model gives several scores per row.
        """
        with torch.inference_mode():
            outputs = self._score(rows).float().cpu()
        scores = self.reward.head.total(outputs)
        if scores.ndim != 1:
            raise InputError(f"the model gives {scores.shape[1]} scores for each image; serve a model that gives one")
        columns = [scores, *(outputs.unbind(dim=1) if self._axes else ())]
        return [*zip(*(column.tolist() for column in columns), strict=True)]

    def _score(self, rows: Sequence[AnyRow]) -> Tensor:
        encoded = [row for row in rows if isinstance(row, LatentRow)]
        if encoded:
            conditioning = Conditioning.join([row.conditioning for row in encoded])
            return self._score_latents(encoded, encoded[0].u, conditioning)
        prompts = list(dict.fromkeys(row.prompt for row in rows))
        kept = sum(prompt in self._memory for prompt in prompts)
        self._observe(kept, len(prompts) - kept)
        options: dict[str, Any] = {"batch_size": self.batch_size, "axes": self._axes}
        images = [row for row in rows if isinstance(row, ImageRow)]
        if images:
            texts = [row.prompt for row in images]
            return self.reward.score(texts, [row.image for row in images], memory=self._memory, **options)
        conditioning = self._memory.encode([row.prompt for row in rows])
        states = [row for row in rows if isinstance(row, StateRow)]
        if states:
            latents = torch.stack([row.latents for row in states])[:, None]
            timesteps = torch.tensor([[row.timestep] for row in states])
            options["conditioning"] = conditioning, self._memory.uncond
            return self.reward.score_states([row.prompt for row in states], latents, timesteps, **options)[:, 0]
        prompted = [row for row in rows if isinstance(row, PromptedRow)]
        return self._score_latents(prompted, prompted[0].u, conditioning)

    def _score_latents(
        self, rows: Sequence[LatentRow] | Sequence[PromptedRow], u: float | None, conditioning: Conditioning
    ) -> Tensor:
        """Score clean latents at the level ``u`` with noise from each row's seed, or at the model's own levels."""
        noise, draws = self.reward.noise, None
        if u is not None:
            noise, process = ScoringNoise(sigmas=(u,)), self.reward.backbone.noise_process
            sigma = process.sigma(timesteps_of(noise, process)).item()
            draws = torch.cat([draw_noise([row.prompt], None, row.seed, sigma, row.latents.shape) for row in rows])
        return self.reward.score_latents(
            [row.prompt for row in rows],
            torch.stack([row.latents for row in rows]),
            noise=noise,
            draws=draws,
            conditioning=(conditioning, self._memory.uncond),
            batch_size=self.batch_size,
            axes=self._axes,
        )


def standing(reward: RewardModel, scores: Tensor) -> tuple[list[float], list[float]] | None:
    """Convert raw ``scores`` ``(N,)`` to z-scores and quantiles.

    Returns:
        z-scores and quantiles, N numbers each; None if the model has no calibration, or one for other noise settings
        than its own.
    """
    calibration = reward.calibration
    if calibration is None or calibration.noise != reward.noise:
        return None
    return calibration.z_score(scores).tolist(), calibration.quantile(scores).tolist()
