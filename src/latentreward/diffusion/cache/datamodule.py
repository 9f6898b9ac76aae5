"""Data module that loads batches of latents from caches, which must agree with each other and with the model."""

import logging
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader

from latentreward.core.contracts import PathText, sources_wanted
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.data import ScoreTargets, select_rows
from latentreward.data.clips import check_frames
from latentreward.data.datamodules import PairLoaders
from latentreward.data.loading import ResumableLoader, as_is, shares_of
from latentreward.data.size_sampling import BucketBatchSampler, EvaluationBatches, Sizing, SmallBuckets
from latentreward.data.splits import SharedPrompts, tell_unopened
from latentreward.data.targets import check_targets, label_remedy
from latentreward.diffusion.cache.buffers import BufferPool, layout_bytes
from latentreward.diffusion.cache.dataset import CachedPairDataset
from latentreward.diffusion.cache.index import CachedPairs, CacheIndex, OnMissing
from latentreward.diffusion.cache.layout import CacheSpec
from latentreward.diffusion.encoders.fingerprint import text_fingerprint, vae_fingerprint

if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    from latentreward.diffusion.backbones.base import LatentNetwork

logger = logging.getLogger(__name__)


def check_caches(specs: Mapping[Path, CacheSpec], with_text: bool) -> CacheSpec:
    """Check that caches can be used together, and return the settings of the first cache.

    Different handling of EXIF orientation is only logged as a warning.

    Raises:
        InputError: If two caches hold latents of different VAEs, clips of different lengths or frame rates, or
            embeddings of different text encoders.
    """
    (first, spec), *others = specs.items()
    for folder, other in others:
        if (other.latent_space, other.vae) != (spec.latent_space, spec.vae):
            raise InputError(f"caches {first} and {folder} hold latents of different VAEs; write one of them again")
        if (found := _clips(other)) != (wanted := _clips(spec)):
            raise InputError(
                f"caches {first} and {folder} hold {wanted} and {found}; write one of them again, with the "
                "images.frames and images.fps of the other"
            )
        if with_text and other.text.fingerprint != spec.text.fingerprint:
            raise InputError(
                f"caches {first} and {folder} hold embeddings of different text encoders; write one of them again, or "
                "set data.cached_text: false"
            )
        if other.exif != spec.exif:
            text = "caches %s and %s treat EXIF orientation differently (exif: %s and %s)"
            logger.warning(text, first, folder, spec.exif, other.exif)
    return spec


def _clips(spec: CacheSpec) -> str:
    return "images" if spec.frames == 1 else f"clips of {spec.frames} frames at {spec.fps:g} per second"


def check_backbone(spec: CacheSpec, backbone: "LatentNetwork", with_text: bool) -> None:
    """Check that a cache was encoded as the backbone of a reward model, or a policy, encodes images and prompts.

    If the backbone has no VAE, or the cache does not record one, only the latent spaces are compared.

    Raises:
        InputError: If the latent space, the VAE or the text encoder differs, if embeddings are cached while the model
            trains its text encoder, or if the cache holds clips and the model takes images.
    """
    if spec.latent_space != backbone.latent_space:
        raise InputError(
            f"the cache holds latents of the space [{spec.latent_space}], but the model takes "
            f"[{backbone.latent_space}]; write the cache with the model's own VAE"
        )
    if spec.frames > 1:
        check_frames("the cache has images.", backbone, spec.frames)
    if backbone.vae is not None and spec.vae is not None:
        fingerprint = vae_fingerprint(backbone.vae.vae)
        if fingerprint != spec.vae:
            raise InputError(
                f"the cache was written with VAE {spec.vae}, but the model's VAE is {fingerprint} (another one, or its "
                "weights in another precision); write the cache with this model's VAE"
            )
    if with_text and spec.text is not None and backbone.text_encoder is not None:
        sees = backbone.text_encoder.sees_sources  # the pictures, which a cache does not hold
        remedy = "train from the images" if sees else "set data.cached_text: false"
        if any(parameter.requires_grad for parameter in backbone.text_encoder.parameters()):
            raise InputError(f"prompt embeddings are cached, but the model trains its text encoder; {remedy}")
        fingerprint = text_fingerprint(backbone.text_encoder)
        if fingerprint != spec.text.fingerprint:
            raise InputError(
                f"the cache holds embeddings of text encoder {spec.text.fingerprint} with {spec.text.num_tokens} "
                f"tokens, but the model's is {fingerprint} with {backbone.text_encoder.num_tokens}; {remedy}, or write "
                "the cache with this model's text encoder"
            )


def check_sources(index: CacheIndex, taken: tuple[int, int | None]) -> None:
    """Raise InputError if pairs of a cache have fewer or more sources than the network takes: least and largest."""
    counts = np.diff(index.source_ends)
    few, many = int(counts.min()), int(counts.max())
    if wanted := sources_wanted(few, taken) or sources_wanted(many, taken):
        held = f"{few}" if few == many else f"{few} to {many}"
        takes = f"takes {wanted} (source_images of pairs)" if wanted != "0" else "makes pictures from text alone"
        raise InputError(
            f"the pairs in the cache {index.folder} have {held} sources, but the model's network {takes}; write a "
            "cache of other pairs, or give another network"
        )


HELD_BATCHES = 3
"""Number of batches held outside the workers: the trainer's current batch, its next batch, and a batch in transfer."""


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
    Before training, the cache is checked against the model's VAE and text encoder.

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
            :class:`~latentreward.data.size_sampling.BucketBatchSampler`. Evaluation always takes every pair once.
        cached_text: Whether to take prompt embeddings from the caches, if all caches hold them. Otherwise the model
            encodes prompts.
        on_missing: ``raise`` stops if a shard of a cache is not written yet. ``skip`` leaves out pairs that need a
            missing shard.
        num_workers: Number of loader processes per rank; 0 reads in the training process.
        prefetch_factor: Number of batches that each worker loads in advance.
        shared_prompts: See :class:`~latentreward.data.PreferenceDataModule`.
        targets: See :class:`~latentreward.data.PreferenceDataModule`.
        loading: See :class:`~latentreward.data.datamodules.PairLoaders`.

    Raises:
        InputError: If a setting is out of range, or a cache is damaged or unfinished. If a split has no pairs left, its
            loader raises InputError.
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
        on_missing: OnMissing = "raise",
        num_workers: int = 1,
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
        open_index, pairs = cache(lambda folder: CacheIndex(Path(folder), on_missing)), dict[str, CachedPairs]()
        for name, split in given.items():
            try:
                pairs[name] = CachedPairs(open_index(split.cache), split.split)
            except InputError as error:
                # Where other splits are only to be kept apart from test, it may be absent.
                if name != "test" or shared_prompts == "raise" or not given.keys() & {"train", "val"}:
                    raise InputError(f"data.{name}: {error}") from error
                tell_unopened(error)
        specs = {reader.index.folder: reader.index.spec for reader in pairs.values()}
        self.cached_text = cached_text and all(spec.text is not None for spec in specs.values())
        self.spec = check_caches(specs, self.cached_text)
        for name, reader in pairs.items():
            reader.report(f"data.{name}")
        labelled = {name: reader for name, reader in pairs.items() if name != "predict"}
        kept, self.emptied = select_rows(labelled, shared_prompts, label_remedy(targets))
        self.datasets = {}
        for name, reader in pairs.items():
            rows = kept.get(name, np.arange(len(reader)))
            values = None if targets is None else targets.values(name, reader)
            given_values = None if values is None else values[rows]
            self.datasets[name] = CachedPairDataset(reader.index, reader.rows[rows], self.cached_text, given_values)

    def prepare_data(self) -> None:
        """Compare the caches' shards with their checksums, in one process per machine."""
        for index in {id(dataset.index): dataset.index for dataset in self.datasets.values()}.values():
            index.check_shards()

    def setup(self, stage: str) -> None:
        """Check that the caches fit the module's backbone or policy.

        Raises:
            InputError: If the caches were written with another VAE or text encoder than the model's.
        """
        module = self.trainer.lightning_module if self.trainer else None
        check_targets(module, self.datasets, stage)
        owners = getattr(getattr(module, "model", None), "backbone", None), getattr(module, "policy", None)
        reader = next(filter(None, owners), getattr(module, "generator", None))
        if reader is not None:
            check_backbone(self.spec, reader, self.cached_text)
            editor: Any = getattr(reader, "family", reader)
            self.check_sources(editor.sources)
            if reader.text_encoder is not None and reader.text_encoder.sees_sources:
                self._check_seen(module)

    def _check_seen(self, module: Any) -> None:
        """Raise InputError if a model whose text encoder sees the pictures needs more than the caches hold of them."""
        if not self.cached_text:
            raise InputError(
                "the model's text encoder reads the pictures to edit too, and of these the cache holds latents alone; "
                "write it with encoder.text: states and set data.cached_text: true, or train from the images"
            )
        head = getattr(getattr(module, "model", None), "head", None)
        if head is not None and head.needs_uncond:
            raise InputError(
                "the head needs the empty prompt with each picture to edit, and the cache holds prompts alone; set the "
                "head's guidance: 1, or train from the images"
            )
        generator = getattr(module, "generator", None)
        if generator is not None and generator.family.needs_uncond(module.guidance_scale):
            raise InputError(
                f"guidance_scale={module.guidance_scale:g} needs the empty prompt with each picture to edit, and the "
                f"cache holds prompts alone; set it to {generator.family.no_guidance:g}, or train from the images"
            )

    def check_sources(self, taken: tuple[int, int | None]) -> None:
        """Raise InputError if a cache's pairs are edits of fewer or more pictures than the network takes."""
        for dataset in self.datasets.values():
            check_sources(dataset.index, taken)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training loader; in each step, all ranks get the same number of pairs of one size."""
        if getattr(self.trainer, "overfit_batches", 0):
            return self._evaluation_loader("train")
        dataset = self._dataset("train")
        rank = shares_of(self.trainer)["rank"]
        sampler = BucketBatchSampler(self._latent_sizes(dataset), self._sizing(), rank)
        if rank == 0:
            logger.info("data.train: %s", sampler.describe())
        return ResumableLoader(dataset, sampler, collate_fn=as_is, **self._worker_settings())

    def _sizing(self) -> Sizing:
        frames = (self.spec.frames - 1) // (self.spec.latent_space.frame_downscale or 1) + 1
        return Sizing(
            self.batch_size,
            self.tokens_per_batch and max(1, self.tokens_per_batch // frames),
            self.small_buckets,
            shares_of(self.trainer)["num_replicas"],
            self.seed,
            self.shuffle,
        )

    def _latent_sizes(self, dataset: CachedPairDataset) -> Any:
        downscale = self.spec.latent_space.downscale
        return dataset.sizes() // [downscale, downscale, 1]

    def _dataset(self, name: str) -> CachedPairDataset:
        """See :meth:`PairLoaders._dataset`; each loader gets a copy whose pool lives as long as its own workers."""
        dataset = copy(super()._dataset(name))
        dataset.pool = self._pool(dataset)
        return dataset

    def _pool(self, dataset: CachedPairDataset) -> BufferPool:
        """Create shared memory for the loader's batches, as large as the largest batch each.

        Each worker has ``prefetch_factor`` + 3 slots; without workers, there are 3 slots in all.
        """
        sizes, sizing = self._latent_sizes(dataset), self._sizing()
        shapes, first = np.unique(sizes, axis=0, return_index=True)
        pairs = [sizing.pairs_per_rank(tokens) for tokens in shapes[:, :2].prod(axis=1).tolist()]
        layouts = [dataset.layout(*one) for one in zip(pairs, dataset.rows[first].tolist(), strict=True)]
        ready = self.prefetch_factor if self.num_workers else 0
        return BufferPool(ready + HELD_BATCHES, max(map(layout_bytes, layouts)), max(1, self.num_workers))

    def evaluation_loading(self, dataset: CachedPairDataset) -> dict[str, Any]:
        """Return the settings of an evaluation loader: batches of one size, in the order of the rows where possible."""
        rank = shares_of(self.trainer)["rank"]
        sampler = EvaluationBatches(self._latent_sizes(dataset), self._sizing(), rank)
        return {"batch_size": None, "sampler": sampler, "collate_fn": as_is}
