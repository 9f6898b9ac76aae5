"""Frozen records that pass between the subpackages: pair, batch, conditioning, features, scores.

Data flows one way: ``PreferencePair`` (readers) → ``PreferenceBatch`` (collate) → latents, noise and ``Conditioning``
(encoders) → ``Features`` (backbone) → scores (head) → ``PairScores`` → loss. In alignment: ``PromptBatch`` (prompts)
→ ``NoisyStates`` (candidates that a reward scores) → ``StepPairs`` or ``StepSamples`` (what is learned from) → loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor of a record, through nested records and tuples; anything else stays."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, TensorRecord):
        names = [field.name for field in fields(value)]  # type: ignore[arg-type]
        return type(value)(**{name: map_tensors(getattr(value, name), function) for name in names})
    if isinstance(value, tuple):
        return tuple(map_tensors(item, function) for item in value)
    return value


class TensorRecord:
    """Mix-in for frozen dataclasses of tensors: Lightning moves a batch by calling ``to``."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return a copy whose tensors went through ``Tensor.to`` with the same arguments."""
        return map_tensors(self, lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """Return a copy in page-locked memory, for ``DataLoader(pin_memory=True)``."""
        return map_tensors(self, lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class ImageRef:
    """One image of a data set, not yet decoded: its bytes, or the file they lie in.

    A published cache holds latents instead: then ``data`` are the bytes of an ``np.save`` file, ``(C, h, w)``, scaled.

    Attributes:
        image_key: Stable name of the *image* (uid, relative path or content hash), never of the pair: images recur.
        data: Encoded bytes, when the reader already holds them.
        path: File with the encoded bytes, otherwise.
        root: Folder that ``path`` must stay in, also through symbolic links, where the path comes from a data file.
        holds: What is encoded: an image, or latents.
    """

    image_key: str
    data: bytes | None = None
    path: Path | None = None
    root: Path | None = None
    holds: Literal["image", "latents"] = "image"


@dataclass(frozen=True)
class PreferencePair:
    """One comparison of two images for a prompt, with the sides in the order its reader gives them.

    Attributes:
        pair_id: Stable name of the comparison, unique in its source; every random draw of the pair is seeded with it.
        prompt: Raw text; truncation belongs to the tokenizer.
        image_a: First image of the file.
        image_b: Second image of the file.
        label_a: Probability that ``image_a`` is preferred, in [0, 1] (½ is a tie); None is unlabelled.
        weight: Weight in the loss before normalisation over the batch, e.g. 1 / rows of the same prompt.
        group_id: Prompt group of the source, if it has one.
        votes: Votes for (a, b), if published.
        confidence: Annotators' confidence in [0, 1], if published.
        model_a: Generator of ``image_a``.
        model_b: Generator of ``image_b``.
        source: Name of the data set.
        split: Name of the split.
    """

    pair_id: str
    prompt: str
    image_a: ImageRef
    image_b: ImageRef
    label_a: float | None
    weight: float = 1.0
    group_id: str | None = None
    votes: tuple[int, int] | None = None
    confidence: float | None = None
    model_a: str | None = None
    model_b: str | None = None
    source: str = ""
    split: str = ""

    def swapped(self) -> "PreferencePair":
        """The same comparison with its two sides exchanged."""
        return replace(
            self,
            image_a=self.image_b,
            image_b=self.image_a,
            label_a=None if self.label_a is None else 1.0 - self.label_a,
            votes=None if self.votes is None else self.votes[::-1],
            model_a=self.model_b,
            model_b=self.model_a,
        )


@dataclass(frozen=True)
class LatentSpace:
    """What tells one VAE's latents from another's; equal spaces can share latents and rewards.

    Read from the VAE's config alone, so two spaces are compared before any weight is loaded.

    Attributes:
        channels: Latent channels.
        downscale: Pixels per latent along each spatial axis.
        scaling_factor: Factor on (posterior sample − shift).
        shift_factor: Shift before scaling; 0 where the config has none.
    """

    channels: int
    downscale: int
    scaling_factor: float
    shift_factor: float = 0.0

    def __str__(self) -> str:
        """One line for error messages."""
        return (
            f"{self.channels} channels, 1/{self.downscale} size, scale {self.scaling_factor:g}, "
            f"shift {self.shift_factor:g}"
        )


@dataclass(frozen=True)
class PreferenceBatch(TensorRecord):
    """Pairs oriented to chosen and rejected; images as pixels or as latents.

    A tie (label ½) has no better side; the image with the smaller key stands first, so that exchanging the sides of
    the source changes nothing.

    Attributes:
        pair_ids: B names.
        prompts: B raw prompts.
        chosen: ``(B, 3, H, W)`` pixels in [-1, 1], or latents ``(B, C, ...)`` already scaled.
        rejected: As ``chosen``.
        chosen_keys: B image keys.
        rejected_keys: B image keys.
        label: ``(B,)`` probability that the chosen image wins, in [½, 1].
        weight: ``(B,)`` weights, not yet normalised.
        latent_space: None for pixels; the space of the latents otherwise.
        conditioning: Encoded prompts, B rows, where they come from a cache; None has the module encode ``prompts``.
        uncond: The encoded empty prompt, one row, likewise.
    """

    pair_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    chosen: Tensor
    rejected: Tensor
    chosen_keys: tuple[str, ...]
    rejected_keys: tuple[str, ...]
    label: Tensor
    weight: Tensor
    latent_space: LatentSpace | None = None
    conditioning: "Conditioning | None" = None
    uncond: "Conditioning | None" = None

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pair_ids)


@dataclass(frozen=True)
class Conditioning(TensorRecord):
    """Encoded prompts, as a diffusion network takes them.

    Attributes:
        prompt_embeds: ``(B, L, D)`` token embeddings.
        pooled_prompt_embeds: ``(B, P)`` one vector per prompt: what the network takes beside the tokens (SDXL, SD3),
            or the text encoder's EOS feature (SD1.5, SD2.1).
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor

    def select(self, index: Tensor | Sequence[int]) -> "Conditioning":
        """Rows ``index``, repeats allowed: one encoded prompt serves several images."""
        rows = torch.as_tensor(index, device=self.prompt_embeds.device)
        return map_tensors(self, lambda tensor: tensor[rows])


@dataclass(frozen=True)
class TapSpec:
    """Width and token grid of one tap.

    Attributes:
        width: Features per token.
        grid: Tokens along each axis at the network's native size: (H, W) for images, (T, H, W) for video, (L,) for
            text.
    """

    width: int
    grid: tuple[int, ...]


@dataclass(frozen=True)
class FeatureSpec:
    """What a backbone will give to a head: everything a head needs to size itself.

    Attributes:
        visual: One entry per visual tap.
        text: One entry per text tap; may be empty.
        temb_dim: Width of the timestep embedding.
        pooled_text_dim: Width of the pooled text vector.
    """

    visual: tuple[TapSpec, ...]
    text: tuple[TapSpec, ...]
    temb_dim: int
    pooled_text_dim: int


@dataclass(frozen=True)
class Features(TensorRecord):
    """What a backbone read from noisy latents.

    Attributes:
        visual: One ``(B, N_i, D_i)`` per visual tap; N_i is the product of ``visual_grids[i]``, row-major.
        visual_grids: Token grid of each visual tap for these latents.
        text: One ``(B, L, D_i)`` per text tap.
        pooled_text: ``(B, P)``.
        temb: ``(B, E)`` timestep embedding as the network computed it.
        uncond: The same for the empty prompt, if it was asked for.
    """

    visual: tuple[Tensor, ...]
    visual_grids: tuple[tuple[int, ...], ...]
    text: tuple[Tensor, ...]
    pooled_text: Tensor
    temb: Tensor
    uncond: "Features | None" = None


@dataclass(frozen=True)
class CrossScores(TensorRecord):
    """Scores of every image against every prompt of the batch, for losses with in-batch negatives.

    Attributes:
        chosen: ``(N, N)``; row i is prompt i, column j the chosen image of pair j.
        rejected: ``(N, N)`` likewise.
    """

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class PairScores(TensorRecord):
    """What a preference loss sees.

    Attributes:
        chosen: ``(B,)``, or ``(B, out_dim)``: rewards of the chosen images.
        rejected: Same shape.
        label: ``(B,)`` probability that chosen wins, in [½, 1].
        weight: ``(B,)`` weights, not yet normalised.
        chosen_sigmas: ``(B,)`` noise level in [0, 1] at which the chosen image was scored.
        rejected_sigmas: ``(B,)``; equals ``chosen_sigmas`` unless the two images of a pair have their own timesteps.
        cross: Only for losses whose ``needs_cross_scores`` is true.
    """

    chosen: Tensor
    rejected: Tensor
    label: Tensor
    weight: Tensor
    chosen_sigmas: Tensor
    rejected_sigmas: Tensor
    cross: CrossScores | None = None

    @property
    def margin(self) -> Tensor:
        """Chosen minus rejected in float32: ``(B,)`` or ``(B, out_dim)``."""
        return self.chosen.float() - self.rejected.float()


@dataclass(frozen=True)
class PromptBatch(TensorRecord):
    """Prompts to sample from.

    Attributes:
        prompts: B raw prompts.
        keys: B names, unique among all occurrences of prompts in a run (pass and place); every random draw for an
            occurrence is seeded with its key.
    """

    prompts: tuple[str, ...]
    keys: tuple[str, ...]

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.prompts)


@dataclass(frozen=True)
class NoisyStates(TensorRecord):
    """States of a sampler, for a reward to score.

    Attributes:
        latents: ``(N, C, ...)`` in the policy's latent space and noise process.
        timesteps: ``(N,)`` of the policy's noise process at which they count as lying; 0 for finished latents.
        rows: ``(N,)`` int64: prompt of each state, a row of what the reward's ``encode_prompts`` gave.
        clean: ``(N, C, ...)`` the policy's prediction of the clean latents, for rewards that ask for it.
    """

    latents: Tensor
    timesteps: Tensor
    rows: Tensor
    clean: Tensor | None = None


@dataclass(frozen=True)
class SampledStates(TensorRecord):
    """States that a policy's sampler passed through.

    Attributes:
        keys: N names, unique in a run: a prompt's key and the number of the step. They give rollouts of several
            processes one order.
        prompts: N raw prompts.
        latents: ``(N, C, ...)`` the states x_t.
        timesteps: ``(N,)`` their timesteps, float32.
    """

    keys: tuple[str, ...]
    prompts: tuple[str, ...]
    latents: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        """Number of states."""
        return len(self.prompts)


@dataclass(frozen=True)
class StepPairs(SampledStates):
    """Pairs of candidates for the next state of each state (LPO, SPO).

    Attributes:
        chosen: ``(N, C, ...)`` the better next state.
        rejected: ``(N, C, ...)`` the worse one.
        gap: ``(N,)`` tanh(Δ/2) of their scores.
    """

    chosen: Tensor
    rejected: Tensor
    gap: Tensor


@dataclass(frozen=True)
class StepSamples(SampledStates):
    """Sampled steps with their advantages (GRPO); K of them start from one state, which a policy evaluates once.

    Attributes:
        next_latents: ``(N, K, C, ...)`` the states after it.
        log_prob: ``(N, K)`` log-probabilities of the steps under the policy that drew them.
        advantage: ``(N, K)``.
    """

    next_latents: Tensor
    log_prob: Tensor
    advantage: Tensor


StepRecord = TypeVar("StepRecord", StepPairs, StepSamples)
Rows = TypeVar("Rows", StepPairs, StepSamples, Conditioning)


def take_rows(record: StepRecord, index: Sequence[int]) -> StepRecord:
    """Rows ``index`` of a record of steps."""
    rows = torch.as_tensor(index, dtype=torch.int64)
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return type(record)(
        **{
            name: value[rows.to(value.device)] if isinstance(value, Tensor) else tuple(value[i] for i in index)
            for name, value in values.items()
        }
    )


def join_rows(records: Sequence[Rows]) -> Rows:
    """Several records, at least one, as one."""
    names = [field.name for field in fields(records[0])]
    columns = {name: [getattr(record, name) for record in records] for name in names}
    return type(records[0])(
        **{name: torch.cat(c) if isinstance(c[0], Tensor) else sum(c, ()) for name, c in columns.items()}
    )


@dataclass(frozen=True)
class RolloutStatistics(TensorRecord):
    """What one rollout of all ranks looked like, for logs, callbacks and messages.

    Attributes:
        timesteps: ``(S,)`` steps at which candidates were scored, float32; 0 for finished latents.
        scores: ``(S, K, P)`` scores of the K candidates of each of P prompts.
        gap: ``(S, P)`` tanh(Δ/2) of the best and the worst candidate.
        kept: ``(S, P)`` bool: whether something is learned from these candidates.
    """

    timesteps: Tensor
    scores: Tensor
    gap: Tensor
    kept: Tensor
