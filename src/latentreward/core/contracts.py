"""Frozen dataclasses that the subpackages pass to each other: pair, batch, conditioning, features, scores.

Training of a reward: ``PreferencePair`` (readers) → ``PreferenceBatch`` (dataset) → latents, noise and ``Conditioning``
(encoders) → ``Features`` (backbone) → scores (head) → ``PairScores`` → loss. Alignment of a policy: ``PromptBatch``
(prompts) → ``NoisyStates`` (candidates to score) → ``StepPairs`` or ``StepSamples`` (training samples) → loss.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from latentreward.core.errors import InputError
from latentreward.core.promises import wrong_tensor

PathText = Annotated[str, "path"]
"""Setting that is a file, a folder, or a name in place of one: ``~`` and environment variables are expanded in it."""


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of ``value`` with ``function`` applied to every tensor, also inside nested records and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, TensorRecord):
        return type(value)(**{name: map_tensors(item, function) for name, item in vars(value).items()})
    if isinstance(value, tuple):
        return tuple(map_tensors(item, function) for item in value)
    return value


def layout_of(value: Any) -> Any:
    """Return the shapes and dtypes of all tensors in a value, as nested tuples; None for anything else."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, TensorRecord):
        value = vars(value)
    if isinstance(value, Mapping):
        value = [*value.values()]
    return tuple(map(layout_of, value)) if isinstance(value, tuple | list) else None


class TensorRecord:
    """Mix-in for frozen dataclasses of tensors that gives them ``to``, which Lightning calls to move a batch."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return a copy with ``Tensor.to(*args, **kwargs)`` applied to every tensor; masks keep their type."""

        def moved(tensor: Tensor) -> Tensor:
            new = tensor.to(*args, **kwargs)
            return new if tensor.is_floating_point() or new.dtype == tensor.dtype else tensor.to(new.device)

        return map_tensors(self, moved)

    def pin_memory(self) -> Self:
        """Return a copy in page-locked memory, for ``DataLoader(pin_memory=True)``."""
        return map_tensors(self, lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class ImageRef:
    """Reference to one image of a data set that is not yet decoded: the encoded bytes, or the file that holds them.

    With ``holds="latents"`` the bytes are those of an ``np.save`` file with scaled latents ``(C, h, w)``, or
    ``(C, 1, h, w)`` in a space with a time axis.
    """

    # Stable name of the *image* (uid, relative path or content hash). An image may be in several pairs and has
    # one key in all of them.
    image_key: str
    data: bytes | None = None  # Encoded bytes; None if ``path`` is given
    path: Path | None = None  # File with the encoded bytes; None if ``data`` is given
    # Folder that must contain ``path`` after symbolic links are resolved; set where the path comes from a data
    # file
    root: Path | None = None
    holds: Literal["image", "latents"] = "image"  # Content of the bytes: an image, or latents
    # Name of the noise from which the image was generated, the text of a
    # :class:`~latentreward.alignment.PriorNoise`; None if it is not known
    noise: str | None = None
    # Whether a text encoder that sees the picture gets it turned upright, as the network does
    exif: Literal["apply", "ignore"] = "apply"
    # Largest width × height that the picture may have for such an encoder; None for the default
    max_pixels: int | None = None

    @property
    def identity(self) -> tuple[str, Path | None, int]:
        """Key, path, and Python's hash of the bytes: lists in two folders, and tables, may have pictures of one name.

        It holds for one process. Bytes keep their hash, so that they are read once.
        """
        return self.image_key, self.path, hash(self.data)


class EditPrompt(str):
    """Instruction to edit pictures: a text that carries the pictures.

    Whatever reads texts reads the instruction. Equal prompts have equal texts and the same pictures in the same order,
    so groups, memories and splits by prompt tell edits of unlike pictures apart. Methods of ``str`` return plain texts;
    :func:`like_prompt` gives a changed text the pictures again.

    Attributes:
        sources: Pictures to edit, in the order that the network takes them.
    """

    sources: tuple[ImageRef, ...]

    def __new__(cls, text: str, sources: Sequence[ImageRef] = ()) -> Self:
        """Create a prompt of an instruction and the pictures to edit."""
        prompt = super().__new__(cls, text)
        prompt.sources = tuple(sources)
        return prompt

    @property
    def identity(self) -> tuple[Any, ...]:
        """Text, and the identities of the pictures; it does not hold their bytes."""
        return (str.__str__(self), *(source.identity for source in self.sources))

    def __eq__(self, other: object) -> bool:
        return self.identity == (other.identity if isinstance(other, EditPrompt) else (other,))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.identity) if self.sources else super().__hash__()

    def __reduce__(self) -> tuple[Any, ...]:
        return EditPrompt, (str.__str__(self), self.sources)


def identity_of(prompt: str) -> tuple[Any, ...]:
    """Return the text of a prompt, and the identities of the pictures that it edits."""
    return prompt.identity if isinstance(prompt, EditPrompt) else (prompt,)


def sources_of(prompt: str) -> tuple[ImageRef, ...]:
    """Return the pictures that a prompt edits; none for a plain text."""
    return prompt.sources if isinstance(prompt, EditPrompt) else ()


def sources_wanted(number: int, taken: tuple[int, int | None]) -> str | None:
    """Return in words how many pictures to edit are ``taken``, least to most, if ``number`` is not among them."""
    least, most = taken
    if number >= least and (most is None or number <= most):
        return None
    return f"at least {least}" if most is None else f"{least}" if most == least else f"{least} to {most}"


def check_sources(name: str, prompts: Sequence[str], taken: tuple[int, int | None]) -> None:
    """Raise InputError if the reward ``name`` does not take the number of pictures that a prompt edits."""
    for number in {len(sources_of(prompt)): None for prompt in prompts}:
        if wanted := sources_wanted(number, taken):
            plural = "s" * (wanted != "1")
            raise InputError(
                f"{name}: it takes {wanted} picture{plural} to edit, and a prompt edits {number}; give prompts with "
                "that number of source_images, or a reward trained on such prompts"
            )


def taken_of_edits(taken: tuple[int, int | None], edits: Callable[[], bool | None]) -> tuple[int, int | None]:
    """Return how many pictures to edit are ``taken`` where ``edits`` tells whether rows edit, None if unknown.

    A network that takes some or none would read a row that lacks its picture as a text alone.
    """
    least, most = taken
    if least or most == 0 or (some := edits()) is None:
        return taken
    return (1, most) if some else (0, 0)


def like_prompt(text: str, prompt: str) -> str:
    """Return ``text`` as a prompt for the pictures that ``prompt`` edits; as it is for a plain text."""
    return EditPrompt(text, prompt.sources) if isinstance(prompt, EditPrompt) else text


def seen_as(prompt: str, **how: Any) -> str:
    """Return a prompt whose pictures a text encoder decodes by this ``exif`` and ``max_pixels``; a plain text as is."""
    sources = [replace(source, **how) for source in sources_of(prompt)]
    return EditPrompt(str.__str__(prompt), sources) if sources else prompt


@dataclass(frozen=True)
class PreferencePair:
    """One comparison of two images for a prompt; a and b follow the order in the source."""

    pair_id: str  # Stable name of the comparison, unique in its source; seeds all random numbers of the pair
    prompt: str  # Raw text, not truncated: the tokenizer truncates. An :class:`EditPrompt` if the images are edits.
    image_a: ImageRef  # First image in the source
    image_b: ImageRef  # Second image in the source
    # Probability that ``image_a`` is preferred, in [0, 1] (½ is a tie); None if the pair has no label
    label_a: float | None
    # Weight in the loss before normalisation over the batch, e.g. 1 / number of pairs of the prompt.
    weight: float = 1.0
    group_id: str | None = None  # Name of the prompt group in the source; None if the source has no groups
    votes: tuple[int, int] | None = None  # Numbers of votes for (a, b); None if the source does not publish them
    confidence: float | None = None  # Annotators' confidence in [0, 1]; None if the source does not publish it
    model_a: str | None = None  # Name of the generator of ``image_a``
    model_b: str | None = None  # Name of the generator of ``image_b``
    source: str = ""  # Name of the data set
    split: str = ""  # Name of the split

    def swapped(self) -> "PreferencePair":
        """Return the pair with a and b exchanged: images, label, votes and generators."""
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
    """Properties of the latents of one VAE; models with equal latent spaces can use each other's latents.

    All values are read without loading the VAE's weights, so that two spaces can be compared before. Scaled latents are
    the posterior sample z after one of three codecs: ``scalar``, ``s · (z − shift)``; ``channel``, ``(z − mean) / std``
    with constants per channel (Wan, Qwen-Image); ``batch_norm``, the same after 2×2 patches were moved into the
    channels, with means and variances from the VAE's weights (FLUX.2).
    """

    channels: int  # Number of latent channels
    downscale: int  # Pixels per latent along each spatial axis
    scaling_factor: float = 1.0  # Factor s of the codec ``scalar``
    shift_factor: float = 0.0  # Value subtracted before scaling; 0 if the config has none
    # Frames per latent along the time axis, the first frame apart; None without a time axis
    frame_downscale: int | None = None
    means: tuple[float, ...] = ()  # Mean of each channel of the codec ``channel``
    stds: tuple[float, ...] = ()  # Standard deviation of each channel of the codec ``channel``
    statistics: str | None = None  # Digest of the two tensors of the codec ``batch_norm``

    @property
    def codec(self) -> Literal["scalar", "channel", "batch_norm"]:
        """Kind of the codec."""
        return "channel" if self.means else "scalar" if self.statistics is None else "batch_norm"

    def shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Return the shape ``(C, h, w)``, or ``(C, T, h, w)`` in a space with a time axis, of one image or clip."""
        time = () if self.frame_downscale is None else ((frames - 1) // self.frame_downscale + 1,)
        return self.channels, *time, height // self.downscale, width // self.downscale

    def check_frames(self, frames: int) -> None:
        """Raise InputError if no clip of this space has ``frames`` frames."""
        step = self.frame_downscale
        if step is None and frames != 1:
            raise InputError(f"frames={frames}: these latents have no time axis; leave frames out")
        if step is not None and (type(frames) is not int or frames < 1 or (frames - 1) % step):
            raise InputError(f"frames={frames!r} must be a multiple of {step} plus 1, such as {20 * step + 1}")

    def record(self) -> dict[str, Any]:
        """Return the fields as plain values, without those that only other codecs have: the form in files."""
        always = ("channels", "downscale", "scaling_factor", "shift_factor")
        return {name: value for name, value in vars(self).items() if name in always or value not in (None, ())}

    @classmethod
    def from_record(cls, values: Mapping[str, Any]) -> Self:
        """Create a space from :meth:`record`, or from its JSON form; raise TypeError for a missing or unknown field."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def __str__(self) -> str:
        size = f"{self.channels} channels, 1/{self.downscale} size"
        if self.frame_downscale is not None:
            size += f", 1/{self.frame_downscale} frames"
        if self.codec == "channel":
            return f"{size}, means {self.means[0]:g}…{self.means[-1]:g}, stds {self.stds[0]:g}…{self.stds[-1]:g}"
        if self.codec == "batch_norm":
            return f"{size}, batch norm {self.statistics}"
        return f"{size}, scale {self.scaling_factor:g}, shift {self.shift_factor:g}"


@dataclass(frozen=True)
class PreferenceBatch(TensorRecord):
    """Batch of pairs, each with a chosen and a rejected image, as pixels or as latents.

    In a tie (label ½) the image with the smaller key counts as chosen, so that the order in the source does not matter.
    """

    pair_ids: tuple[str, ...]  # B names of pairs
    prompts: tuple[str, ...]  # B raw prompts
    chosen: Tensor  # ``(B, 3, H, W)`` pixels in [-1, 1], or scaled latents ``(B, C, ...)``
    rejected: Tensor  # As ``chosen``
    chosen_keys: tuple[str, ...]  # B image keys
    rejected_keys: tuple[str, ...]  # B image keys
    label: Tensor  # ``(B,)`` probability that the chosen image wins: in [½, 1] from a reader, else in [0, 1]
    weight: Tensor  # ``(B,)`` weights, not yet normalised
    latent_space: LatentSpace | None = None  # Space of the latents; None for pixels
    # Encoded prompts from a cache, B rows; with None the training module encodes ``prompts``
    conditioning: "Conditioning | None" = None
    uncond: "Conditioning | None" = None  # Encoded empty prompt from a cache, one row; None if there is none
    # Given values of the images, such as a teacher's scores; None if there are none
    targets: "PairTargets | None" = None
    # The pictures that the images are edits of, one tensor of B rows for each place in their order: pixels, or
    # latents where the images are latents. Empty for text to image.
    sources: tuple[Tensor, ...] = ()
    # B names of the noises from which the chosen images were generated, None where it is not known
    chosen_noise: tuple[str | None, ...] = ()
    rejected_noise: tuple[str | None, ...] = ()  # As ``chosen_noise``

    def __post_init__(self) -> None:
        if self.label.device.type != "cpu":  # an accelerator would be waited for; batches are made on the CPU
            return
        for name, low, high in (("label", 0.0, 1.0), ("weight", 0.0, math.inf)):
            if problem := wrong_tensor(getattr(self, name), (len(self),), low=low, high=high):
                raise InputError(f"PreferenceBatch: {name} is {problem}")

    def __len__(self) -> int:
        return len(self.pair_ids)


@dataclass(frozen=True)
class Conditioning(TensorRecord):
    """Encoded prompts in the form that a diffusion network takes."""

    prompt_embeds: Tensor  # ``(B, L, D)`` token embeddings
    # ``(B, P)``, one vector per prompt: the network's pooled input (SDXL, SD3, FLUX.1), or the text encoder's EOS
    # feature where the network takes none (SD1.5, SD2.1). None for families without one.
    pooled_prompt_embeds: Tensor | None = None
    # ``(B, L)`` bool, true for tokens that belong to the prompt, which come first; at least one per row. None for
    # families whose padding tokens take part.
    prompt_mask: Tensor | None = None
    # Latents ``(B, C, ...)`` of the pictures that editors edit, clean and canonical, in the order of the
    # pictures; those of a row's pictures may have sizes of their own. Empty for text to image.
    source_latents: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def select(self, index: Tensor | Sequence[int]) -> "Conditioning":
        """Return the rows ``index``, which may repeat; for all rows in their order, it may be this record itself."""
        rows = torch.as_tensor(index)
        # No copy of all rows in their order. An index on an accelerator is not read, which would be a wait; a copy of
        # what inference mode made can be part of a graph.
        here = rows.device.type == "cpu" and rows.dtype == torch.int64 and not self.prompt_embeds.is_inference()
        if here and rows.tolist() == [*range(len(self))]:
            return self
        rows = rows.to(self.prompt_embeds.device)
        return map_tensors(self, lambda tensor: tensor[rows])

    @classmethod
    def join(cls, parts: Sequence["Conditioning"]) -> "Conditioning":
        """Concatenate the rows of at least one record; masked tokens are padded with zeros to the longest part."""
        if len({tuple(one.shape[1:] for one in part.source_latents) for part in parts}) > 1:
            raise InputError(
                "encoded prompts have sources of different numbers or sizes; set source_size: made, and give prompts "
                "of one number"
            )
        if len({part.pooled_prompt_embeds is None for part in parts}) > 1:
            raise InputError("only some of the encoded prompts have a pooled vector; encode all with one text encoder")
        lengths = {part.prompt_embeds.shape[1] for part in parts}
        masked = any(part.prompt_mask is not None for part in parts)
        if len(lengths) > 1 and not masked:
            raise InputError(
                f"encoded prompts have {' and '.join(map(str, sorted(lengths)))} tokens; encode all at one length"
            )
        padded = [part.padded(max(lengths)) for part in parts] if masked else list(parts)
        texts = [[getattr(part, field.name) for part in padded] for field in fields(cls)[:3]]
        sources = zip(*(part.source_latents for part in padded), strict=True)
        tokens, pooled, mask = (None if column[0] is None else torch.cat(column) for column in texts)
        assert tokens is not None
        return cls(tokens, pooled, mask, tuple(map(torch.cat, sources)))

    def padded(self, length: int) -> "Conditioning":
        """Return a copy with a mask and ``length`` tokens: zeros follow, or masked tokens at the end are cut off."""
        tokens, mask = self.prompt_embeds, self.prompt_mask
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        missing = length - tokens.shape[1]
        if missing <= 0:
            return replace(self, prompt_embeds=tokens[:, :length], prompt_mask=mask[:, :length])
        return replace(self, prompt_embeds=F.pad(tokens, (0, 0, 0, missing)), prompt_mask=F.pad(mask, (0, missing)))

    def trimmed(self) -> "Conditioning":
        """Return a copy without the tokens at the end that no row's mask contains; a copy as it is without a mask."""
        if self.prompt_mask is None:
            return self
        return self.padded(max(int(self.prompt_mask.sum(dim=1).max()), 1))

    def zeros(self) -> "Conditioning":
        """Return a copy in which all embeddings are zeros, as some pipelines encode the empty prompt."""
        pooled = self.pooled_prompt_embeds
        zeros = None if pooled is None else torch.zeros_like(pooled)
        return replace(self, prompt_embeds=torch.zeros_like(self.prompt_embeds), pooled_prompt_embeds=zeros)

    def beside(self, prompts: "Conditioning") -> "Conditioning":
        """Return this empty prompt for each row of ``prompts``, with the sources of the row.

        It has one row, or B rows where the text depends on the sources. Editors see the sources in both passes.
        """
        if len(self) not in (1, len(prompts)):
            raise InputError(f"the empty prompt has {len(self)} rows for {len(prompts)} prompts; give one, or one each")
        rows = self if len(self) == len(prompts) else self.select([0] * len(prompts))
        return replace(rows, source_latents=prompts.source_latents)

    def empty_for(self, rows: Tensor | Sequence[int]) -> "Conditioning":
        """Return this empty prompt for the prompts ``rows``; it is as it is if one row serves all prompts."""
        return self if len(self) == 1 else self.select(rows)

    def pooled(self) -> Tensor:
        """Return the pooled vectors ``(B, P)``; without them the mean ``(B, D)`` of the tokens.

        Padding does not count: tokens outside the mask, or without a mask those that are 0 (Wan). Of a prompt without
        tokens the mean is 0.
        """
        if self.pooled_prompt_embeds is not None:
            return self.pooled_prompt_embeds
        used = (self.prompt_embeds != 0).any(dim=-1) if self.prompt_mask is None else self.prompt_mask
        weights = used.unsqueeze(-1).float()
        mean = (self.prompt_embeds * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return mean.to(self.prompt_embeds)


@dataclass(frozen=True)
class TapSpec:
    """Width and token grid of one tap: an intermediate output of the network that is read as a feature."""

    width: int  # Features per token
    # Number of tokens along each axis at the network's native size: (H, W) for images, (T, H, W) for video, (L,)
    # for text
    grid: tuple[int, ...]


@dataclass(frozen=True)
class FeatureSpec:
    """Widths and grids of the features that a backbone returns, from which a head derives its layer sizes."""

    visual: tuple[TapSpec, ...]  # One entry per visual tap
    text: tuple[TapSpec, ...]  # One entry per text tap; may be empty
    temb_dim: int  # Width of the timestep embedding
    pooled_text_dim: int  # Width of the pooled text vector
    # Channels and native grid of the network's output map; None if the backbone does not return it
    output: TapSpec | None = None


@dataclass(frozen=True)
class Features(TensorRecord):
    """Features that a backbone computed from noisy latents."""

    # One tensor ``(B, N_i, D_i)`` per visual tap; N_i is the product of ``visual_grids[i]``, tokens in row-major
    # order
    visual: tuple[Tensor, ...]
    visual_grids: tuple[tuple[int, ...], ...]  # Token grid of each visual tap for these latents
    text: tuple[Tensor, ...]  # One tensor ``(B, L, D_i)`` per text tap
    pooled_text: Tensor  # ``(B, P)`` pooled text vector
    temb: Tensor  # ``(B, E)`` timestep embedding as the network computed it
    # Features of the same latents for the empty prompt; None if only the prompt was read
    uncond: "Features | None" = None
    # ``(B, L)`` bool, true for text tokens that belong to the prompt; None if all take part
    text_mask: Tensor | None = None
    # ``(B, C, ...)`` the network's output map; None unless the backbone's ``output_map`` is true
    output: Tensor | None = None


@dataclass(frozen=True)
class CrossScores(TensorRecord):
    """Scores of every image for every prompt of the batch, for losses with in-batch negatives."""

    chosen: Tensor  # ``(N, N)``; entry (i, j) is the score of the chosen image of pair j for prompt i
    rejected: Tensor  # ``(N, N)``; entry (i, j) is the score of the rejected image of pair j for prompt i


@dataclass(frozen=True)
class PairTargets(TensorRecord):
    """Given values of the images of B pairs, which losses compare scores with: a teacher's scores, or labels."""

    # ``(B,)``, or ``(B, out_dim)`` with a column for each score of the head: values of the chosen images; NaN
    # where an image has none
    chosen: Tensor
    rejected: Tensor  # Values of the rejected images, in the shape of ``chosen``
    chosen_std: Tensor | None = None  # The teacher's uncertainty of ``chosen``, in its units; None if it states none
    rejected_std: Tensor | None = None  # The teacher's uncertainty of ``rejected``


@dataclass(frozen=True)
class PairScores(TensorRecord):
    """Input of a preference loss: the scores, labels and noise levels of B pairs."""

    chosen: Tensor  # ``(B,)``, or ``(B, out_dim)``: rewards of the chosen images
    rejected: Tensor  # Rewards of the rejected images, in the shape of ``chosen``
    label: Tensor  # ``(B,)`` probability that chosen wins, as in :class:`PreferenceBatch`
    weight: Tensor  # ``(B,)`` weights, not yet normalised
    chosen_sigmas: Tensor  # ``(B,)`` noise level in [0, 1] at which the chosen image was scored
    # ``(B,)`` noise level of the rejected image; equals ``chosen_sigmas`` unless the two images of a pair have
    # timesteps of their own
    rejected_sigmas: Tensor
    # Scores of every image for every prompt; None unless the loss's ``needs_cross_scores`` is true
    cross: CrossScores | None = None
    targets: PairTargets | None = None  # Given values of the images; None if the data have none

    @property
    def margin(self) -> Tensor:
        """Chosen minus rejected reward in float32: ``(B,)`` or ``(B, out_dim)``."""
        return self.chosen.float() - self.rejected.float()


@dataclass(frozen=True)
class PromptBatch(TensorRecord):
    """Batch of prompts for which a policy samples latents."""

    prompts: tuple[str, ...]  # B raw prompts
    # B names; each occurrence of a prompt in a run (pass over the list, index in the list) has a key of its own,
    # which seeds all random numbers for that occurrence
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __add__(self, other: "PromptBatch") -> "PromptBatch":
        return PromptBatch(self.prompts + other.prompts, self.keys + other.keys)

    def times(self, count: int) -> "PromptBatch":
        """Return each prompt ``count`` times in turn, with keys ``KEY/0``, ``KEY/1``, … of their own."""
        return PromptBatch(
            tuple(prompt for prompt in self.prompts for _ in range(count)),
            tuple(f"{key}/{number}" for key in self.keys for number in range(count)),
        )

    def select(self, rows: Sequence[int]) -> "PromptBatch":
        """Return the prompts at the given indices."""
        return PromptBatch(tuple(self.prompts[row] for row in rows), tuple(self.keys[row] for row in rows))

    def split(self, size: int | None) -> list["PromptBatch"]:
        """Split into batches of at most ``size`` prompts, in order; None leaves one batch."""
        size, rows = size or max(len(self), 1), range(len(self))
        return [self.select(rows[at : at + size]) for at in rows[::size]]


@dataclass(frozen=True)
class NoisyStates(TensorRecord):
    """States of a sampler (noisy latents with their timesteps) for a reward to score."""

    latents: Tensor  # ``(N, C, ...)`` in the policy's latent space and noise process
    # ``(N,)`` timesteps of the policy's noise process at which the states are scored; 0 for finished latents
    timesteps: Tensor
    # ``(N,)`` int64, the prompt of each state as a row index into the result of the reward's ``encode_prompts``
    rows: Tensor
    # ``(N, C, ...)`` the policy's prediction of the clean latents; None for rewards that do not need it
    clean: Tensor | None = None


@dataclass(frozen=True)
class SampledStates(TensorRecord):
    """States that a policy's sampler visited during a rollout."""

    # N names, unique in a run, made of the prompt's key and the number of the sampling step. Sorting by key puts
    # the states of several ranks into one order.
    keys: tuple[str, ...]
    prompts: tuple[str, ...]  # N raw prompts
    latents: Tensor  # ``(N, C, ...)`` the states x_t
    timesteps: Tensor  # ``(N,)`` timesteps of the states, float32

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class StepPairs(SampledStates):
    """States x_t, each with two candidates for the next state: the preferred and the rejected one (LPO, SPO)."""

    chosen: Tensor  # ``(N, C, ...)`` the next state with the higher score
    rejected: Tensor  # ``(N, C, ...)`` the next state with the lower score
    gap: Tensor  # ``(N,)`` tanh(Δ/2), where Δ is the difference of the two scores


@dataclass(frozen=True)
class StepSamples(SampledStates):
    """States x_t, each with K sampled next states and their advantages (GRPO).

    The policy evaluates each state once for all of its K steps.
    """

    next_latents: Tensor  # ``(N, K, C, ...)`` the K next states of each state
    log_prob: Tensor  # ``(N, K)`` log-probabilities of the steps under the policy that sampled them
    advantage: Tensor  # ``(N, K)`` advantages of the steps
    # ``(N, K)`` advantages of the steps' own rewards, for losses of two advantages; else None
    process: Tensor | None = None
    # ``(N, C, ...)`` mean of the steps under the policy that sampled them, for trust regions; else None
    old_mean: Tensor | None = None
    held: Tensor | None = None  # ``(N, K)`` bool: whether the KL term acts on the step, for gates; else None


@dataclass(frozen=True)
class RenoisedSamples(SampledStates):
    """Finished latents, each with a timestep that it is noised to again (DiffusionNFT, AWM, RAM).

    ``latents`` are the finished ones, ``timesteps`` those to train at. A sample has a row for each of its timesteps.
    """

    advantage: Tensor  # ``(N,)`` advantages of the samples


@dataclass(frozen=True)
class RenoisedGroups(SampledStates):
    """All K finished latents of a prompt, with one timestep that they are noised to again (DGPO, CRD).

    ``latents`` are ``(N, K, C, ...)``. A prompt has a row for each of its timesteps.
    """

    advantage: Tensor  # ``(N, K)`` advantages of the samples

    def samples(self, shared_noise: bool) -> RenoisedSamples:
        """Return N·K rows, those of a group in turn, with the group's key for one noise, or keys of their own."""
        count = self.advantage.shape[1]
        repeated = PromptBatch(self.prompts, self.keys).times(count)
        keys = tuple(key for key in self.keys for _ in range(count)) if shared_noise else repeated.keys
        timesteps = self.timesteps.repeat_interleave(count)
        return RenoisedSamples(keys, repeated.prompts, self.latents.flatten(0, 1), timesteps, self.advantage.flatten())


@dataclass(frozen=True)
class LookAheadStates(SampledStates):
    """States of K trajectories of a prompt after equally many steps, with the scores of what they ended in.

    ``latents`` are ``(N, K, C, ...)``. A prompt has a row for each recorded number of steps.
    """

    scores: Tensor  # ``(N, K)`` scores of the finished samples
    spread: Tensor  # ``(N,)`` standard deviation of such scores within a prompt, over the whole rollout


StepRecord = TypeVar("StepRecord", bound=SampledStates)


def take_rows(record: StepRecord, index: Sequence[int]) -> StepRecord:
    """Return the rows ``index`` of a record of steps; all its tensors and names are indexed alike."""
    rows = torch.as_tensor(index, dtype=torch.int64)

    def taken(value: Any) -> Any:
        if value is None:
            return None
        return value[rows.to(value.device)] if isinstance(value, Tensor) else tuple(value[i] for i in index)

    return type(record)(**{name: taken(value) for name, value in vars(record).items()})


def join_rows(records: Sequence[StepRecord]) -> StepRecord:
    """Concatenate the rows of at least one record; raise InputError if a field is None in some records alone."""

    def joined(column: list[Any]) -> Any:
        if any(value is None for value in column):
            if any(value is not None for value in column):
                raise InputError(
                    "the rows left of earlier rollouts were made with another loss or trust_region; resume with the "
                    "settings of before, or start a new run"
                )
            return None
        return torch.cat(column) if isinstance(column[0], Tensor) else sum(column, ())

    names = vars(records[0])
    return type(records[0])(**{name: joined([getattr(record, name) for record in records]) for name in names})


@dataclass(frozen=True)
class RolloutStatistics(TensorRecord):
    """Scores of one rollout over all ranks, for logs, callbacks and messages."""

    timesteps: Tensor  # ``(S,)`` timesteps of the states before the steps, float32; 0 for finished latents
    scores: Tensor  # ``(S, K, P)`` scores of the K candidates of each of P prompts
    gap: Tensor  # ``(S, P)`` tanh(Δ/2), where Δ is the best minus the worst score of the candidates
    kept: Tensor  # ``(S, P)`` bool: whether these candidates become training samples


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for Apple's devices, which have no wider type."""
    return torch.float32 if device.type == "mps" else torch.float64


def to_float64(values: Tensor) -> Tensor:
    """Return ``values`` in float64, on the CPU if their device has no such type."""
    return (values if widest_float(values.device) == torch.float64 else values.cpu()).double()
