"""Batches of a cache's pairs, and the data module that deals them out."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from latentreward.core.contracts import (
    Conditioning,
    EditPrompt,
    ImageRef,
    PathText,
    PreferenceBatch,
    PreferencePair,
    sources_wanted,
)
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.data import PairReader, ScoreTargets, select_rows
from latentreward.data.clips import check_frames
from latentreward.data.datamodules import PairLoaders
from latentreward.data.dataset import is_turned, stack_targets
from latentreward.data.image_sizes import ImageSizes, NearestBucket, OneSize
from latentreward.data.loading import ResumableLoader, as_is, shares_of
from latentreward.data.sampling import BucketBatchSampler, EvaluationBatches, Sizing, SmallBuckets
from latentreward.data.score_table import check_targets, label_remedy
from latentreward.data.splits import SharedPrompts, tell_unopened
from latentreward.diffusion.cache import store
from latentreward.diffusion.cache.store import IMAGES, PAIRS, PROMPTS, CacheSpec
from latentreward.diffusion.encoders.fingerprint import text_fingerprint, vae_fingerprint

if TYPE_CHECKING:
    from latentreward.diffusion.backbones.base import LatentNetwork

logger = logging.getLogger(__name__)


class CacheIndex:
    """Tables of a cache, opened once for all data sets that read from it.

    Attributes:
        spec: Settings that the cache was written with.
        pairs: Table of P pairs; ``image_a``, ``image_b``, ``prompt``, ``label`` and ``weight`` are columns of it.
        image_size: ``(I, 2)`` height and width in pixels of each image, as encoded.
        seen: Whether the text encoder saw the pictures of edits, so that a text with others is another prompt.
        places: Table → ``(n, 2)`` file, and row in the file, of each image or prompt.
        tokens: ``(T, 2)`` first token in the file, and number of tokens, of each prompt; for an encoder with a mask.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, plan = folder, store.read_plan(folder)
        if problems := store.damaged_tables(folder, plan):
            raise InputError(f"cache {folder}: {problems[0]}; run the same `latentreward cache` again")
        self.spec, self.files = plan.spec, store.files_of(folder)
        self.pairs, images, prompts = (store.read_table(folder, name) for name in (PAIRS, IMAGES, PROMPTS))
        self.image_key, self.noise, self.prompts = images["image_key"], images["noise"], prompts["prompt"]
        self.seen = prompts["reader_row"].null_count < len(prompts)
        self.image_a, self.image_b, self.prompt = (self.pairs[n].to_numpy() for n in ("image_a", "image_b", "prompt"))
        self.label, self.weight = (self.pairs[name].to_numpy().astype(float) for name in ("label_a", "weight"))
        sources = self.pairs["source_images"].combine_chunks()
        self.source_images, counts = sources.flatten().to_numpy(), sources.value_lengths().to_numpy()
        self.source_ends = np.append(0, counts.cumsum())
        self.image_size = np.column_stack([images[side].to_numpy() for side in ("height", "width")])
        self.places = {IMAGES: np.zeros((len(images), 2), int), PROMPTS: np.zeros((len(prompts), 2), int)}
        masked = self.spec.text is not None and self.spec.text.masked
        self.tokens = np.zeros((len(prompts), 2), int) if masked else None
        unread = np.zeros(len(images), bool)
        for number, file in enumerate(self.files):
            try:
                unread[[*store.check_file(folder, plan, file, contents=False)]] = True
            except InputError as error:
                raise InputError(f"cache {folder}: {error}; run the same `latentreward cache` again") from error
            places = self.places[PROMPTS if file.size is None else IMAGES]
            places[file.rows] = np.column_stack([np.full(len(file.rows), number), np.arange(len(file.rows))])
            if file.size is None and self.tokens is not None:
                with store.opened(folder, file.name) as tensors:
                    lengths = tensors[store.LENGTHS].numpy()
                self.tokens[file.rows] = np.column_stack([lengths.cumsum() - lengths, lengths])
        self.unreadable = unread[self.image_a] | unread[self.image_b]
        self.unreadable[np.repeat(np.arange(len(self.pairs)), counts)[unread[self.source_images]]] = True
        self.uneven = (self.image_size[self.image_a] != self.image_size[self.image_b]).any(axis=1) & ~self.unreadable

    def sources(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows ``(n, len(rows))`` of the pictures that pairs are edits of, of which each has n."""
        firsts, lasts = self.source_ends[rows], self.source_ends[rows + 1]
        return self.source_images[firsts + np.arange(int(lasts[0] - firsts[0]))[:, None]]

    def prompts_of(self, rows: np.ndarray) -> list[str]:
        """Return the prompts of pairs; those of edits have the keys of the pictures that are edited."""
        texts: list[str] = self.prompts.take(self.prompt[rows]).to_pylist()
        if not len(self.source_images):
            return texts
        spans = zip(self.source_ends[rows], self.source_ends[rows + 1], strict=True)
        keys = (self.image_key.take(self.source_images[first:last]).to_pylist() for first, last in spans)
        return [EditPrompt(text, list(map(ImageRef, names))) for text, names in zip(texts, keys, strict=True)]


class CachedPairs(PairReader):
    """Reader of the usable pairs of a cache, or of one split of it, without their latents.

    Attributes:
        rows: ``(N,)`` row of each pair in the table of pairs, ascending.
    """

    holds = "nothing"

    def __init__(self, index: CacheIndex, split: str | None = None) -> None:
        super().__init__(on_error="skip")
        self.index, splits = index, np.array(index.pairs["split"].to_pylist(), object)
        chosen = np.ones(len(splits), bool) if split is None else splits == split
        if not chosen.any():
            names = ", ".join(map(repr, dict.fromkeys(splits)))
            raise InputError(f"cache {index.folder} has no split {split!r}; it has {names}")
        for reason, mask in (("unreadable image", index.unreadable), ("images of two sizes", index.uneven)):
            self.skipped.update({reason: lost} if (lost := int((mask & chosen).sum())) else {})
        self.rows = np.flatnonzero(chosen & ~index.unreadable & ~index.uneven)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> PreferencePair:
        index, row = self.index, int(self.rows[number])
        label = None if np.isnan(index.label[row]) else float(index.label[row])
        a, b = (ImageRef(index.image_key[int(side[row])].as_py()) for side in (index.image_a, index.image_b))
        [prompt] = index.prompts_of(self.rows[[number]])
        return PreferencePair(index.pairs["pair_id"][row].as_py(), prompt, a, b, label, float(index.weight[row]))

    def labels(self) -> np.ndarray:
        return self.index.label[self.rows]

    def prompts(self) -> list[str]:
        return self.index.prompts_of(self.rows)

    def pair_ids(self) -> list[str]:
        return self.index.pairs["pair_id"].take(self.rows).to_pylist()


class CachedPairDataset(Dataset[PreferenceBatch]):
    """Pairs of a cache, of which ``__getitems__`` reads a whole batch, of one image size and number of sources.

    Latents and embeddings keep their stored dtype. Prompts with a mask are padded with zeros to the longest of a batch.

    Args:
        index: The cache.
        rows: Rows of the pairs in its table.
        with_text: Whether batches hold prompt embeddings, if the cache does.
        targets: ``(len(rows), 2, T, K)`` given values of the images, see
            :meth:`~latentreward.data.ScoreTargets.values`; None for none.

    Attributes:
        image_sizes: Rule by which images were resized; None if the cache was copied from one that does not say.
        exif: Whether the images were turned upright by their EXIF orientation.
    """

    def __init__(
        self, index: CacheIndex, rows: Sequence[int] | np.ndarray, with_text: bool = True, targets: Tensor | None = None
    ) -> None:
        self.index, self.rows, self.targets = index, np.asarray(rows, dtype=np.int64), targets
        self.with_text, self.exif = with_text and index.spec.text is not None, index.spec.exif
        self.image_sizes: ImageSizes | None = None
        images, self._mapped = index.spec.images, dict[tuple[int, str], Tensor]()
        if index.spec.origin == "vae" and images.size is None:
            plain = tuple((one.height, one.width) for one in images.sizes())  # checkpoints hold no class of ours
            self.image_sizes = NearestBucket(plain, images.resize)
        elif index.spec.origin == "vae":
            self.image_sizes = OneSize(*images.sizes()[0], images.resize, images.frames, images.fps)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def taken(self) -> tuple[int, int]:
        """Least and largest number of pictures that pairs edit."""
        numbers = self.sizes()[:, 2]
        return int(numbers.min()), int(numbers.max())

    def sizes(self) -> np.ndarray:
        """Return the height and width of each pair's images in pixels, and its number of sources, ``(N, 3)``."""
        numbers = np.diff(self.index.source_ends)[self.rows]
        return np.column_stack([self.index.image_size[self.index.image_a[self.rows]], numbers])

    def __getitem__(self, numbers: int | Sequence[int]) -> PreferenceBatch:
        """Read a batch of one or several pairs, as a ``DataLoader`` with ``batch_size=None`` requests it."""
        return self.__getitems__([numbers] if isinstance(numbers, int) else numbers)

    def __getitems__(self, numbers: Sequence[int]) -> PreferenceBatch:
        """Read pairs as one batch, with chosen and rejected images as of :func:`latentreward.data.collate_pairs`."""
        index, rows = self.index, self.rows[np.asarray(numbers)]
        images, labels = np.stack([index.image_a[rows], index.image_b[rows]]), index.label[rows]
        keys = np.array([index.image_key.take(side).to_pylist() for side in images], object)
        known = ~np.isnan(labels)
        labels = np.where(known, labels, 0.5)  # no label is as a tie
        turned = np.array([is_turned(*one) for one in zip(labels.tolist(), *keys.tolist(), strict=True)])
        images[:, turned], keys[:, turned] = images[::-1, turned], keys[::-1, turned]
        labels[turned] = 1 - labels[turned]
        targets = None
        if self.targets is not None:
            values = self.targets[list(numbers)]
            values[turned] = values[turned].flip(1)
            targets = stack_targets([*values])
        any_noise = index.noise.null_count < len(index.noise)
        noises = [tuple(index.noise.take(side).to_pylist()) for side in images] if any_noise else []
        latents = self._read(IMAGES, store.LATENTS, np.concatenate([images, index.sources(rows)]).ravel())
        chosen, rejected, *sources = latents.split(len(rows))
        return PreferenceBatch(
            pair_ids=tuple(index.pairs["pair_id"].take(rows).to_pylist()),
            prompts=tuple(index.prompts_of(rows)),
            chosen=chosen,
            rejected=rejected,
            chosen_keys=tuple(keys[0]),
            rejected_keys=tuple(keys[1]),
            label=torch.tensor(labels, dtype=torch.float32),
            weight=torch.tensor(np.where(known, index.weight[rows], 0.0), dtype=torch.float32),
            latent_space=index.spec.latent_space,
            conditioning=self._conditioning(index.prompt[rows]) if self.with_text else None,
            uncond=self._conditioning(np.zeros(1, int)) if self.with_text and not index.seen else None,
            targets=targets,
            sources=tuple(sources),
            **dict(zip(("chosen_noise", "rejected_noise"), noises, strict=False)),
        )

    def _conditioning(self, prompts: np.ndarray) -> Conditioning:
        index, text = self.index, self.index.spec.text
        pooled = self._read(PROMPTS, store.POOLED, prompts) if text is not None and text.pooled_dim else None
        if index.tokens is None:
            return Conditioning(self._read(PROMPTS, store.EMBEDS, prompts), pooled)
        spans, files = index.tokens[prompts], index.places[PROMPTS][prompts, 0].tolist()
        rows = zip(files, spans.tolist(), strict=True)
        tokens = [self._opened(file, store.EMBEDS)[first : first + count] for file, (first, count) in rows]
        embeds = pad_sequence(tokens, batch_first=True)
        return Conditioning(embeds, pooled, torch.arange(embeds.shape[1]) < torch.tensor(spans[:, 1:]))

    def _read(self, table: str, name: str, numbers: np.ndarray) -> Tensor:
        """Read rows of a tensor by the numbers of their images or prompts."""
        places = self.index.places[table][numbers].tolist()
        return torch.stack([self._opened(file, name)[place] for file, place in places])

    def _opened(self, number: int, name: str) -> Tensor:
        """Return a tensor of a file, mapped so that its pages are read when they are copied."""
        if (number, name) not in self._mapped:
            with store.opened(self.index.folder, self.index.files[number].name) as tensors:
                self._mapped[number, name] = tensors[name]
        return self._mapped[number, name]


def check_backbone(spec: CacheSpec, backbone: "LatentNetwork", with_text: bool) -> None:
    """Check that a cache was encoded as the backbone of a reward model, or a policy, encodes images and prompts.

    If the backbone has no VAE, or the cache does not record one, only the latent spaces are compared.
    """
    if spec.latent_space != backbone.latent_space:
        raise InputError(
            f"the cache holds latents of the space [{spec.latent_space}], but the model takes "
            f"[{backbone.latent_space}]; write the cache with the model's own VAE"
        )
    if spec.images.frames > 1:
        check_frames("the cache has images.", backbone, spec.images.frames)
    if backbone.vae is not None and spec.vae is not None and (vae := vae_fingerprint(backbone.vae.vae)) != spec.vae:
        raise InputError(
            f"the cache was written with VAE {spec.vae}, but the model's VAE is {vae} (another one, or its weights in "
            "another precision); write the cache with this model's VAE"
        )
    if with_text and spec.text is not None and (encoder := backbone.text_encoder) is not None:
        remedy = "train from the images" if encoder.sees_sources else "set data.cached_text: false"
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            raise InputError(f"prompt embeddings are cached, but the model trains its text encoder; {remedy}")
        if (own := text_fingerprint(encoder)) != spec.text.fingerprint:
            raise InputError(
                f"the cache holds embeddings of text encoder {spec.text.fingerprint} with {spec.text.num_tokens} "
                f"tokens, but the model's is {own} with {encoder.num_tokens}; {remedy}, or write the cache anew"
            )


@dataclass(frozen=True)
class CachedSplit:
    """A cache, or one split of a cache, as a source of pairs.

    Attributes:
        cache: Folder that ``latentreward cache`` wrote.
        split: Name of the split, as the reader named it when the cache was written; None takes all pairs.
    """

    cache: PathText
    split: str | None = None


class CachedPreferenceDataModule(PairLoaders):
    """Data module of cached pairs for training, validation, test and prediction.

    Each batch holds latents of one image size. As in :class:`~latentreward.data.PreferenceDataModule`, unlabelled pairs
    are used in prediction only, no prompt is in two splits by default, and checkpoints record the position in the
    training epoch. Pairs with an image that could not be read when the cache was written are left out and counted.
    Before training, the cache is compared with the model's VAE and text encoder.

    Args:
        train: Training pairs.
        val: Validation pairs.
        test: Test pairs.
        predict: Pairs to score, labelled or not, whose prompts may be in other splits.
        tokens_per_batch: Instead of ``batch_size``: latent positions (height × width, of clips × latent frames) of the
            chosen images in a batch and rank, so that batches of small images hold more pairs. A batch holds at least
            one pair.
        small_buckets: Treatment of the last training pairs of an image size, too few for a batch on every rank.
            ``short`` makes a smaller batch, ``fill`` repeats pairs, ``drop`` leaves the pairs out of the epoch; see
            :class:`~latentreward.data.sampling.BucketBatchSampler`. Evaluation always takes every pair once.
        cached_text: Whether to take prompt embeddings from the caches, if all caches hold them. Otherwise the model
            encodes prompts.
        num_workers: Processes per rank that read ahead, for a cache on a network disk. 0 reads in the training process.
        prefetch_factor: Number of batches that each of them reads in advance.
        shared_prompts: See :class:`~latentreward.data.PreferenceDataModule`.
        targets: See :class:`~latentreward.data.PreferenceDataModule`.
        loading: See :class:`~latentreward.data.datamodules.PairLoaders`.
    """

    remedy = "give it a cache, e.g. --data.{split}.cache FOLDER --data.{split}.split NAME"

    def __init__(
        self,
        *,
        train: CachedSplit | None = None,
        val: CachedSplit | None = None,
        test: CachedSplit | None = None,
        predict: CachedSplit | None = None,
        tokens_per_batch: int | None = None,
        small_buckets: SmallBuckets = "short",
        cached_text: bool = True,
        num_workers: int = 0,
        prefetch_factor: int = 4,
        shared_prompts: SharedPrompts = "drop",
        targets: ScoreTargets | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(num_workers=num_workers, prefetch_factor=prefetch_factor, **loading)
        check_at_least_one("data.", tokens_per_batch=tokens_per_batch)
        self.tokens_per_batch, self.small_buckets = tokens_per_batch, small_buckets
        splits = {"train": train, "val": val, "test": test, "predict": predict}
        given = {name: split for name, split in splits.items() if split is not None}
        if not given:
            raise InputError("data.train, val, test and predict are all unset; give at least one a cache")
        open_index, pairs = cache(lambda folder: CacheIndex(Path(folder))), dict[str, CachedPairs]()
        for name, split in given.items():
            try:
                pairs[name] = CachedPairs(open_index(split.cache), split.split)
            except InputError as error:
                # Where other splits are only to be kept apart from test, it may be absent.
                if name != "test" or shared_prompts == "raise" or not given.keys() & {"train", "val"}:
                    raise InputError(f"data.{name}: {error}") from error
                tell_unopened(error)
        indices = [reader.index for reader in pairs.values()]
        self.spec = indices[0].spec
        self.cached_text = cached_text and all(index.spec.text is not None for index in indices)
        for index in indices[1:]:
            self._check_alike(indices[0], index)
        for name, reader in pairs.items():
            reader.report(f"data.{name}")
        labelled = {name: reader for name, reader in pairs.items() if name != "predict"}
        kept, self.emptied = select_rows(labelled, shared_prompts, label_remedy(targets))
        self.datasets = {}
        for name, reader in pairs.items():
            rows = kept.get(name, np.arange(len(reader)))
            values = None if targets is None else targets.values(name, reader)  # None where a split has no given values
            values = None if values is None else values[rows]
            self.datasets[name] = CachedPairDataset(reader.index, reader.rows[rows], self.cached_text, values)

    def _check_alike(self, first: CacheIndex, other: CacheIndex) -> None:
        """Raise InputError if two caches cannot be used together."""
        one, two = (self._compared(index.spec) for index in (first, other))
        if differ := [name for name in one if one[name] != two[name]]:
            raise InputError(
                f"caches {first.folder} and {other.folder} are of different {' and '.join(differ)}; write one of them "
                "again (of another text encoder alone: or set data.cached_text: false)"
            )

    def _compared(self, spec: CacheSpec) -> dict[str, Any]:
        text = spec.text.fingerprint if self.cached_text and spec.text is not None else None
        clips = {"images.frames": spec.images.frames, "images.fps": spec.images.fps}
        return {"VAE": (spec.latent_space, spec.vae), **clips, "text encoder": text}

    def setup(self, stage: str) -> None:
        """Raise InputError if the caches were encoded otherwise than the module's backbone or policy encodes."""
        module = self.trainer.lightning_module if self.trainer else None
        check_targets(module, self.datasets, stage)
        model, generator = getattr(module, "model", None), getattr(module, "generator", None)
        reader = next(filter(None, (getattr(model, "backbone", None), getattr(module, "policy", None))), generator)
        if reader is None:
            return
        check_backbone(self.spec, reader, self.cached_text)
        taken = getattr(reader, "family", reader).sources
        for index in {id(one.index): one.index for one in self.datasets.values()}.values():
            counts = np.diff(index.source_ends)
            for number in (int(counts.min()), int(counts.max())):  # not every network looks at them itself
                if wanted := sources_wanted(number, taken):
                    told = f"pairs in the cache {index.folder} have {number} sources, but the model's network takes"
                    raise InputError(f"{told} {wanted}; write a cache of other pairs, or give another network")
        if reader.text_encoder is None or not reader.text_encoder.sees_sources:
            return
        # Of the pictures the cache holds latents alone, and of the empty prompt none with pictures.
        lacks = "" if self.cached_text else "write the cache with encoder.text: true, set data.cached_text: true"
        if getattr(getattr(model, "head", None), "needs_uncond", False):
            lacks = lacks or "also with the empty prompt for the head; set the head's guidance: 1"
        if generator is not None and generator.family.needs_uncond(module.guidance_scale):
            off = f"set guidance_scale to {generator.family.no_guidance:g}"
            lacks = lacks or f"also with the empty prompt for guidance_scale; {off}"
        if lacks:
            reads = "the model's text encoder reads the pictures to edit too"
            raise InputError(f"{reads}; {lacks}, or train from the images")

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training loader; in each step, all ranks get the same number of pairs of one size."""
        if getattr(self.trainer, "overfit_batches", 0):
            return self._evaluation_loader("train")
        dataset, rank = self._dataset("train"), shares_of(self.trainer)["rank"]
        sampler = BucketBatchSampler(*self._sizing(dataset), rank)
        if rank == 0:
            logger.info("data.train: %s", sampler.describe())
        return ResumableLoader(dataset, sampler, collate_fn=as_is, **self._worker_settings())

    def _sizing(self, dataset: CachedPairDataset) -> tuple[np.ndarray, Sizing]:
        """Return the latents' sizes of a data set, and the settings of its batches."""
        scale, step = self.spec.latent_space.downscale, self.spec.latent_space.frame_downscale or 1
        tokens = self.tokens_per_batch and max(1, self.tokens_per_batch // ((self.spec.images.frames - 1) // step + 1))
        world = shares_of(self.trainer)["num_replicas"]
        sizing = Sizing(self.batch_size, tokens, self.small_buckets, world, self.seed, self.shuffle)
        return dataset.sizes() // [scale, scale, 1], sizing

    def evaluation_loading(self, dataset: CachedPairDataset) -> dict[str, Any]:
        """See :meth:`PairLoaders.evaluation_loading`; batches of one size, in the order of the rows where possible."""
        sampler = EvaluationBatches(*self._sizing(dataset), shares_of(self.trainer)["rank"])
        return {"batch_size": None, "sampler": sampler, "collate_fn": as_is}
