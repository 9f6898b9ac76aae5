"""Data modules of the tiny world: preference pairs, whose files it writes, and captions as prompts for alignment."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader

from latentreward.core.contracts import EditPrompt, ImageRef, PathText
from latentreward.core.errors import check_at_least_one, check_range
from latentreward.core.storage.digests import digest
from latentreward.data import HPDv3Reader, JSONLPairReader, PairReader, PickAPicReader, PreferenceDataModule
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.data.readers.base import Sources
from latentreward.tinyworld.captions import caption_splits, draw_caption
from latentreward.tinyworld.edits import draw_edit
from latentreward.tinyworld.pairs import encode_jpeg
from latentreward.tinyworld.scenes import render
from latentreward.tinyworld.writers import write_edits, write_hpdv3, write_pickapic


class TinyWorldDataModule(PreferenceDataModule):
    """Data module of drawn preference pairs, 32 × 32 pixels, stored in the layout of a real data set.

    The first run writes the pairs under ``root``; later runs read the files. The files are read by the reader of the
    real data set.

    Args:
        root: Folder of the files.
        layout: ``pickapic`` (parquet with JPEG bytes, with ties) or ``hpdv3`` (JSON and JPEG files, no ties); or
            ``edits``: pairs of edits (JSON lines and JPEG files, with ties), whose validation labels have no noise.
        train_pairs: Number of training pairs.
        val_pairs: Number of validation pairs, whose prompts are not in the training pairs.
        data_seed: Seed of the pairs.
        val_seed: Seed of the validation pairs, if they should not change with the training pairs; by default
            ``data_seed``.
        sources: Whether to read the pictures that were edited, in the layout ``edits``; see :class:`PairReader`.
        options: See :class:`PreferenceDataModule`.
    """

    def __init__(
        self,
        root: PathText = "runs/tinyworld/pickapic",
        layout: Literal["pickapic", "hpdv3", "edits"] = "pickapic",
        train_pairs: int = 6000,
        val_pairs: int = 1000,
        data_seed: int = 0,
        val_seed: int | None = None,
        sources: Sources = "read",
        **options: Any,
    ) -> None:
        train: PairReader
        val: PairReader
        held_out = "test" if layout == "hpdv3" else "validation"
        numbers = {"train": train_pairs, held_out: val_pairs}
        seed = data_seed if val_seed in (None, data_seed) else {"train": data_seed, held_out: val_seed}
        if layout == "pickapic":
            folder = write_pickapic(Path(root), numbers, seed)
            # Pairs count equally: with equal weight per prompt, the few captions of single shapes would hardly count.
            train, val = (PickAPicReader(str(folder), split, weight="equal") for split in ("train", "validation"))
        elif layout == "edits":
            folder = write_edits(Path(root), numbers, seed)
            train, val = (
                JSONLPairReader(str(folder / f"{split}.jsonl"), split=split, sources=sources)
                for split in ("train", "validation")
            )
        else:
            folder = write_hpdv3(Path(root), numbers, seed)
            train, val = HPDv3Reader(str(folder), "train"), HPDv3Reader(str(folder), "test")
        super().__init__(32, train=train, val=val, predict=val, **options)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the validation pairs, which no setting of the tiny world was chosen on."""
        return self._evaluation_loader("val")


class TinyWorldPromptDataModule(PromptLoaders):
    """Data module of distinct captions of the tiny world's training split, drawn at random, as prompts.

    Args:
        captions: Number of captions.
        data_seed: Seed of the choice of captions.
        options: See :class:`~latentreward.data.alignment.prompts.PromptLoaders`.
    """

    def __init__(self, captions: int = 1024, data_seed: int = 0, **options: Any) -> None:
        there_are = sum(map(len, caption_splits()["train"].values()))
        check_range(f"[1, {there_are}]", "the training split has no more", **{"data.captions": captions})
        rng, drawn = np.random.default_rng([data_seed, 5]), dict[str, None]()
        while len(drawn) < captions:
            drawn.setdefault(draw_caption(rng, "train").text)
        super().__init__(tuple(drawn), **options)


class TinyWorldEditPromptDataModule(PromptLoaders):
    """Data module of edits of the tiny world's training split, drawn at random, as prompts: each has its own picture.

    Args:
        edits: Number of edits.
        data_seed: Seed of the edits.
        options: See :class:`~latentreward.data.alignment.prompts.PromptLoaders`.
    """

    def __init__(self, edits: int = 1024, data_seed: int = 0, **options: Any) -> None:
        check_at_least_one("data.", edits=edits)
        super().__init__(edit_prompts("train", edits, data_seed), **options)


def edit_prompts(split: str, number: int, seed: int) -> tuple[EditPrompt, ...]:
    """Draw edits of a split as prompts that carry their pictures as JPEG bytes."""
    rng, prompts = np.random.default_rng([seed, 6]), []
    for _ in range(number):
        source, edit = draw_edit(split, rng)
        jpeg = encode_jpeg(render(source))
        prompts.append(EditPrompt(edit.text, [ImageRef(digest([jpeg], 16), jpeg)]))
    return tuple(prompts)
