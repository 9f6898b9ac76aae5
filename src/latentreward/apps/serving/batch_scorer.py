"""Rows of requests, and scoring of batches of rows with a reward model."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentreward.core.contracts import Conditioning, sources_of
from latentreward.core.errors import InputError
from latentreward.reward import RewardModel, ScoringNoise
from latentreward.reward.scoring.scoring_noise import draw_noise, timesteps_of

TOKENS = 64  # number of which the length of padded prompts is a multiple


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a request."""

    prompt: str  # raw text; an EditPrompt if an image is an edit of pictures
    # Latents ``(C, h, w)`` or ``(C, T, h, w)`` of the pictures that latents are an edit of, scaled, float32
    sources: tuple[Tensor, ...] = field(default=(), kw_only=True)

    @property
    def shape(self) -> Hashable:
        """Key of rows that take the same time: kind, and number and shapes of the sources."""
        return type(self).__name__, len(sources_of(self.prompt)), *(one.shape for one in self.sources)

    @property
    def group(self) -> Hashable:
        """Key of rows that can share a batch; rows of equal groups have equal shapes."""
        return self.shape


@dataclass(frozen=True, eq=False)
class ImageRow(Row):
    """An image with its prompt; images and their sources are resized to the model's size."""

    image: Image.Image  # 8-bit RGB image


@dataclass(frozen=True, eq=False)
class LatentRow(Row):
    """Clean latents with a prompt, all float32."""

    latents: Tensor  # ``(C, h, w)`` or ``(C, T, h, w)``, scaled
    u: float | None = None  # noise level in [0, 1]; None takes the model's own levels and seeds
    seed: int = 0  # seed of the noise at ``u``, which also depends on the raw prompt
    # Prompt as the network gets it, one row without padding; None if the model encodes the raw prompt
    encoded: Conditioning | None = None

    @property
    def tokens(self) -> int | None:
        """Number of tokens in a batch, which for a prompt with a mask does not depend on the other rows."""
        if self.encoded is None:
            return None
        count = self.encoded.prompt_embeds.shape[1]
        return count if self.encoded.prompt_mask is None else -(-count // TOKENS) * TOKENS

    @property
    def shape(self) -> Hashable:
        """Key of rows that take the same time: shape of the latents, number of tokens, whose noise levels."""
        return super().shape, self.latents.shape, self.tokens, self.u is None

    @property
    def group(self) -> Hashable:
        """Key of rows that can share a batch: :attr:`shape`, whether there is a mask, and noise level."""
        return self.shape, self.encoded is None or self.encoded.prompt_mask is None, self.u


@dataclass(frozen=True, eq=False)
class StateRow(Row):
    """A noisy state of a trajectory with a raw prompt; states at any timesteps share a batch."""

    latents: Tensor  # ``(C, h, w)`` or ``(C, T, h, w)``, scaled, float32
    timestep: float  # timestep of the model's noise process

    @property
    def shape(self) -> Hashable:
        """Key of rows that take the same time: kind, and shapes of the latents and the sources."""
        return super().shape, self.latents.shape


Scores = tuple[float, ...]  # score of a row and, of a model with two axes, fidelity and aesthetics after it


class RowScorer:
    """Scorer of batches of rows with a reward model.

    All rows of a batch have one ``group``, which is an attribute of the rows: equal kinds, shapes and noise level.
    """

    def __init__(
        self,
        reward: RewardModel,
        batch_size: int,  # rows per forward pass
        prompts_kept: int = 1,  # encoded prompts that are kept for later batches, at least batch_size
        observe: Callable[[int, int], None] = lambda kept, encoded: None,  # counts raw prompts, kept and to be encoded
    ) -> None:
        self.reward, self.batch_size, self._observe = reward, batch_size, observe
        self._axes = bool(reward.axes)
        self._memory = reward.prompt_memory(max(prompts_kept, batch_size))

    def __call__(self, rows: Sequence[Row]) -> list[Scores]:
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

    def _score(self, rows: Sequence[Any]) -> Tensor:
        prompts, first = [row.prompt for row in rows], rows[0]
        options: dict[str, Any] = {"batch_size": self.batch_size, "axes": self._axes}
        if isinstance(first, LatentRow) and first.encoded is not None:
            parts = [row.encoded if row.encoded.prompt_mask is None else row.encoded.padded(row.tokens) for row in rows]
            conditioning = Conditioning.join(parts)
        else:
            new = {*prompts}
            kept = sum(prompt in self._memory for prompt in new)
            self._observe(kept, len(new) - kept)
            if isinstance(first, ImageRow):
                return self.reward.score(prompts, [row.image for row in rows], memory=self._memory, **options)
            scale = self.reward.backbone.latent_space.downscale
            self._memory.resize_sources(*(side * scale for side in first.latents.shape[-2:]))
            conditioning = self._memory.encode(prompts)
        device = conditioning.prompt_embeds.device
        sources = (torch.stack(place).to(device) for place in zip(*(row.sources for row in rows), strict=True))
        conditioning = replace(conditioning, source_latents=tuple(sources))
        latents = torch.stack([row.latents for row in rows])
        options["conditioning"] = conditioning, self._memory.encode_uncond(prompts)
        if isinstance(first, StateRow):
            timesteps = torch.tensor([[row.timestep] for row in rows])
            return self.reward.score_states(prompts, latents[:, None], timesteps, **options)[:, 0]
        if first.u is None:
            return self.reward.score_latents(prompts, latents, noise=self.reward.noise, **options)
        noise, process = ScoringNoise(sigmas=(first.u,)), self.reward.backbone.noise_process
        sigma = process.sigma(timesteps_of(noise, process)).item()
        draws = torch.cat([draw_noise([row.prompt], None, row.seed, sigma, row.latents.shape) for row in rows])
        return self.reward.score_latents(prompts, latents, noise=noise, draws=draws, **options)


def standing(reward: RewardModel, scores: Tensor) -> tuple[list[float], list[float]] | None:
    """Convert raw ``scores`` ``(N,)`` to N z-scores and N quantiles.

    Returns None if the model has no calibration, or one for other noise settings than its own.
    """
    calibration = reward.calibration
    if calibration is None or calibration.noise != reward.noise:
        return None
    return calibration.z_score(scores).tolist(), calibration.quantile(scores).tolist()
