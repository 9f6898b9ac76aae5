"""Readers of published sets of pairs and ranked images: each maps a row to its pairs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentreward.core.contracts import ImageRef, PathText
from latentreward.core.errors import InputError
from latentreward.core.storage.user_files import find_files, whole_file
from latentreward.data.images import NO_IMAGE
from latentreward.data.readers.json_rows import parse_number, parse_text, short
from latentreward.data.readers.rows import (
    NO_OBJECT,
    BadRow,
    Pair,
    PairRowParser,
    Row,
    RowReader,
    choice,
    parse_ranks,
    ranked_pairs,
)
from latentreward.data.readers.tables import (
    HINT,
    Columns,
    ParquetPart,
    Source,
    SplitTable,
    damage_named,
    open_table,
    read_list,
)
from latentreward.data.readers.tars import ImageArchives

TEXT, LONG = pa.string(), pa.large_string()
PICKAPIC: Columns = {
    "caption": LONG,
    "has_label": pa.bool_(),
    **dict.fromkeys(("label_0", "label_1"), pa.float64()),
    **dict.fromkeys(("image_0_uid", "image_1_uid"), TEXT),
    "num_example_per_prompt": pa.int64(),
    "are_different": pa.bool_(),
    **dict.fromkeys(("model_0", "model_1"), TEXT),
}
GENAI: Columns = {"prompt": LONG, "left_model": TEXT, "right_model": TEXT, "vote_type": TEXT}
VOTES = {"leftvote": 1.0, "rightvote": 0.0, "tievote": 0.5, "bothbad_vote": 0.5}
WITHOUT_IMAGES = (
    "this is the copy without images: take the copy with images, or set images to none for prompts and labels"
)
LOWEST, HIGHEST = 1, 5
SKILLS = ("basic", "advanced")
HPDV3 = {
    "prompt": "prompt",
    "chosen": "path1",
    "rejected": "path2",
    "model_a": "model1",
    "model_b": "model2",
    "votes": "choice_dist",
    "confidence": "confidence",
    "source_images": "source_images",
}


def fill_from_table(
    reader: RowReader,
    table: SplitTable,
    columns: Columns,
    images: Sequence[str],
    parser: PairRowParser,
    memory_map: bool = False,
    **facts: pa.DataType,
) -> None:
    """Give a reader the pairs of a published table with its own ``facts``, and let it find its images there."""
    table.check_images(images, HINT)
    rows = table.records(columns, HINT)
    if images:
        table.open_images(images, memory_map)
        reader.images_in = table, images
    reader.fill(rows, table.name, f"split: {table.name} has no rows left; check the files", parser, facts)


class PickAPicReader(RowReader):
    """Reader of one split of Pick-a-Pic v1 or v2; image 0 is a, image 1 is b.

    The label is ``label_0`` (1, 0, or ½ for a tie). A row is unlabelled if ``has_label`` is not true, a label is null,
    or the two labels do not add up to 1, e.g. (1, 1); a label that is NaN or outside [0, 1] makes it bad.
    ``best_image_uid`` is not used, because its values for ties and nulls are not documented.

    Args:
        source: Folder, parquet files, hub id or ``Dataset``, see :class:`~latentreward.data.DatasetPairReader`.
        split: Name of the split, e.g. ``train``, ``validation_unique`` or ``test_unique``.
        revision: Commit, tag or branch of the hub data set, so that the data cannot change.
        drop_identical: Leave out rows with two identical images (``are_different`` false, or equal uids); recommended
            for training.
        weight: Weight of a row in the loss. ``per_prompt`` is 1 / ``num_example_per_prompt`` (the number of rows with
            the row's prompt), so that each prompt counts once, as in the training of PickScore and LRM; 1 if this
            number is null or not positive. ``equal`` is 1 for every row.
        memory_map: Copy the images once into the cache of ``datasets``, which takes as much disk space as the download.
            Without it, a row in random order costs its row group, of hundreds of rows in the published files.
        images: ``read``, which training needs, reads the images. ``none`` does not, for score tables, for
            ``latentreward inspect``, and for the copy of the data set that is published without images.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.
    """

    exif, winner_first = "ignore", False

    def __init__(
        self,
        source: Source,
        split: str,
        *,
        revision: str | None = None,
        drop_identical: bool = False,
        weight: Literal["per_prompt", "equal"] = "per_prompt",
        memory_map: bool = False,
        images: Literal["read", "none"] = "read",
        **options: Any,
    ) -> None:
        super().__init__("pickapic", split, **options)
        self._drop, self._weigh = drop_identical, weight == "per_prompt"
        self.holds = "images" if images == "read" else "nothing"
        columns = ("jpg_0", "jpg_1") if images == "read" else ()
        table = open_table(self, source, split, revision)
        table.check_images(columns, HINT, WITHOUT_IMAGES)
        parser = PairRowParser(self, self._pairs, columns={"prompt": "caption"}, sources=None)
        fill_from_table(self, table, PICKAPIC, columns, parser, memory_map, label_0=pa.float64())

    def _pairs(self, name: str, row: dict[str, Any]) -> list[Pair]:
        uids = row["image_0_uid"], row["image_1_uid"]
        if self._drop and (row["are_different"] is False or (uids[0] is not None and uids[0] == uids[1])):
            self.skipped["identical images"] += 1
            return []
        examples = row["num_example_per_prompt"] if self._weigh else None
        pair = {"image_a": uids[0], "image_b": uids[1], "model_a": row["model_0"], "model_b": row["model_1"]}
        pair |= {"label_0": row["label_0"], "weight": 1 / examples if examples and examples > 0 else None}
        if row["has_label"]:
            pair["label"] = choice(self, {label: row[label] for label in ("label_0", "label_1")})
        else:
            self.remarks["unlabelled (has_label is not true)"] += 1
        return [pair]

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        if self.holds == "images":
            return super().find_images(row)
        return [ImageRef(row["image_a"] or ""), ImageRef(row["image_b"] or "")]


class GenAIBenchReader(RowReader):
    """Reader of TIGER-Lab's GenAI-Bench, votes on pairs of generated images; the left image is a, the right one b.

    Both bad is a tie (½), as ``tievote`` is; :meth:`facts` returns the votes themselves. A row is unlabelled if its
    ``vote_type`` is null or not a known vote. An image is named by a hash of its bytes.

    Args:
        source: Folder, parquet files, hub id or ``Dataset``, see :class:`~latentreward.data.DatasetPairReader`; the
            files may lie in ``image_generation/``.
        split: ``test`` or ``test_v1``.
        revision: Commit, tag or branch of the hub data set, so that the data cannot change.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.
    """

    exif, winner_first = "ignore", False

    def __init__(self, source: Source, split: str = "test", *, revision: str | None = None, **options: Any) -> None:
        super().__init__("genai_bench_tiger", split, **options)
        table = open_table(self, source, split, revision, "image_generation")
        parser = PairRowParser(self, self._pairs, sources=None)
        fill_from_table(self, table, GENAI, ("left_image", "right_image"), parser, vote=TEXT)

    def _pairs(self, name: str, row: dict[str, Any]) -> list[Pair]:
        if (vote := row["vote_type"]) not in VOTES:
            self.remarks[f"unlabelled (vote_type is none of {', '.join(VOTES)})"] += 1
        models = {"model_a": row["left_model"], "model_b": row["right_model"]}
        return [{**models, "label": VOTES.get(vote), "vote": vote}]


class GenAIBenchCMUReader(RowReader):
    """Reader of CMU's GenAI-Bench: pairs of images of several models for a prompt, compared by mean human rating.

    A row with n models (six as published) gives n (n − 1) / 2 pairs, in the order of the models' names, with the row's
    ``Index`` as ``group_id``. Equal means are a tie (½). Pairs of an image without ratings are unlabelled; a null
    rating is left out of the mean, and one that is no number from 1 to 5 makes the row bad. An image is named by a hash
    of its bytes.

    Args:
        source: Folder, parquet files, hub id or ``Dataset``, see :class:`~latentreward.data.DatasetPairReader`.
        split: Name of the split; only ``train`` is published, although the data set is a benchmark.
        revision: Commit, tag or branch of the hub data set, so that the data cannot change.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.
    """

    exif = "ignore"

    def __init__(self, source: Source, split: str = "train", *, revision: str | None = None, **options: Any) -> None:
        super().__init__("genai_bench_cmu", split, **options)
        table = open_table(self, source, split, revision)
        (place, schema), *_ = table.schemas()
        kind = schema.field("HumanRatings").type if "HumanRatings" in schema.names else pa.null()
        if not pa.types.is_struct(kind):
            raise InputError(f"{place}: no column HumanRatings of each model's ratings; {HINT}")
        self.models = sorted(field.name for field in kind)
        columns = {"Index": TEXT, "Prompt": LONG, "HumanRatings": None}
        columns |= {"Tags": None} if "Tags" in schema.names else {}
        parser = PairRowParser(self, self._pairs, columns={"prompt": "Prompt"}, sources=None)
        fill_from_table(self, table, columns, self.models, parser, tags=pa.list_(TEXT))

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        table, _ = self.images_in  # type: ignore[misc]
        if row.get("model_a") is None:  # a placeholder
            return [ImageRef("")] * 2
        return self.embedded_images(table.read(row["row"], [row["model_a"], row["model_b"]]))

    def _pairs(self, name: str, row: dict[str, Any]) -> list[Pair]:
        # An advanced skill makes the prompt advanced.
        basic, advanced = ([skill for skill in (row.get("Tags") or {}).get(kind) or () if skill] for kind in SKILLS)
        tags = [SKILLS[bool(advanced)], *basic, *advanced] if basic or advanced else []
        ratings, ranks = row["HumanRatings"] or {}, list[float | None]()
        for model in self.models:
            given = [parse_number(rating) for rating in ratings.get(model) or () if rating is not None]
            if not all(number is not None and LOWEST <= number <= HIGHEST for number in given):
                told = f"ratings of {model} are {short(ratings[model])}, not numbers from {LOWEST} to {HIGHEST}"
                raise BadRow(told, "rating not readable")
            ranks.append(-sum(given) / len(given) if given else None)  # type: ignore[arg-type]
        if missing := ranks.count(None):
            self.remarks["image without ratings"] += missing
        models = [{"model": model} for model in self.models]
        return ranked_pairs(name, [None] * len(models), ranks, models, group=name, group_id=row["Index"], tags=tags)


class HPDv3Reader(RowReader):
    """Reader of one JSON file of HPDv3, or of the pairs of HPDv3++.

    ``path1`` is the preferred image, as published, even where the majority of votes contradicts it: the authors
    weighted annotators by ability. Unreadable votes and confidences are read as not published. HPDv3++
    (``Junjun2333/HPDv3-PlusPlus``) has the same rows, with votes and confidence as texts or null, in subfolders of
    ``root``. Its ``rollout.json`` holds single images without labels and is not read.

    Args:
        root: Folder with the JSON files and ``images/``; images outside it are not opened.
        split: Name of the JSON file without suffix: ``all``, ``train`` or ``test``; of HPDv3++ with its subfolder.
        min_confidence: Leave out rows with a lower confidence than this, e.g. 0.95; rows without confidence are kept.
        label: ``"hard"`` labels the image of ``path1`` with 1. ``"votes"`` uses its fraction of the votes as the label,
            and 1 for a row without votes.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.
    """

    exif = "ignore"

    def __init__(
        self,
        root: PathText,
        split: str,
        *,
        min_confidence: float | None = None,
        label: Literal["hard", "votes"] = "hard",
        **options: Any,
    ) -> None:
        super().__init__("hpdv3", split, **options)
        self.folder = Path(root)
        file = self.folder / f"{split}.json"
        self.check_inside(root, file)

        def pairs(name: str, row: dict[str, Any]) -> list[Pair]:
            (pair,) = parser.own_pair(name, {column: row.get(column) for column in HPDV3.values()})
            confidence, votes = pair.get("confidence"), (pair.get("votes_a", 0), pair.get("votes_b", 0))
            if min_confidence is not None and confidence is not None and confidence < min_confidence:
                self.skipped["confidence below the threshold"] += 1
                return []
            if label == "votes" and sum(votes):
                pair["label"] = votes[0] / sum(votes)
            return [pair]

        parser = PairRowParser(self, pairs, columns=HPDV3, sources=("source_images",), check_image=self.check_path)
        empty = f"split: {file} has no rows left; check the file and min_confidence"
        self.fill(read_list(file), str(file), empty, parser)


def ranked_files(
    reader: RowReader, name: str, row: Mapping[str, Any], fields: tuple[str, str], count: int | None = None
) -> tuple[list[str | None], Sequence[float | None]]:
    """Return the paths and ranks in two ``fields`` of a row, ``count`` if given; raise BadRow for others."""
    paths = row.get(fields[0])
    if not isinstance(paths, list) or count not in (None, len(paths)):
        problem = f"{fields[0]} is {short(paths)}, not {'a list of' if count is None else count} paths"
        raise BadRow(problem, f"{fields[0]} not readable")
    for path in paths:
        reader.check_path(name, fields[0], path)
    return [*map(parse_text, paths)], parse_ranks(reader, fields[1], row.get(fields[1]), len(paths))


class HPDv2Reader(RowReader):
    """Reader of one split of HPDv2; images a and b keep the order of the file, which does not reveal the winner.

    ``train.json`` holds pairs, each with a choice such as (1, 0). ``test.json`` holds groups of images with a rank for
    each image. A group of n images gives n (n − 1) / 2 pairs, in the order of its images and with one ``group_id``.
    Equal ranks and the choice (½, ½) are ties. A pair is unlabelled if its choice is null or missing, or is neither a
    preference nor a tie, e.g. (1, 1). If the file gives the annotators' own rankings, they become the votes of a pair;
    annotators who rank both images equally are not counted. The label follows the published rank, even where the
    majority of votes contradicts it.

    Args:
        root: Folder with ``{split}.json`` and, in ``{split}/``, the images of the unpacked ``{split}.tar.gz``; images
            outside ``{split}/`` are not opened.
        split: ``train`` or ``test``.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.
    """

    exif, winner_first = "ignore", False

    def __init__(self, root: PathText, split: str, **options: Any) -> None:
        super().__init__("hpdv2", split, **options)
        file, self.folder = Path(root, f"{split}.json"), Path(root, split)
        self.check_inside(root, file, self.folder)
        self.prefix = f"{self.folder.name}/"
        rows = [*read_list(file)]
        ranked = any("image_path" in row for _, _, row in rows if isinstance(row, dict))
        parser = PairRowParser(self, self._ranked if ranked else self._compared, sources=())
        self.fill(rows, str(file), f"split: {file} has no pairs left; give the published file", parser)

    def _compared(self, name: str, row: dict[str, Any]) -> list[Pair]:
        images, shares = ranked_files(self, name, row, ("file_path", "human_preference"), 2)
        label = shares[0]
        if None not in shares and tuple(shares) not in {(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)}:
            self.remarks["unlabelled (human_preference is neither a choice nor a tie)"] += 1
            label = None
        return [{"image_a": images[0], "image_b": images[1], "label": label, "group": name}]

    def _ranked(self, name: str, row: dict[str, Any]) -> list[Pair]:
        images, ranks = ranked_files(self, name, row, ("image_path", "rank"))
        pairs = ranked_pairs(name, images, ranks, group=name, group_id=name)
        for pair, votes in zip(pairs, self._votes(row.get("raw_annotations"), len(images)), strict=False):
            pair["votes_a"], pair["votes_b"] = votes
        return pairs

    def _votes(self, value: Any, count: int) -> list[tuple[int, int]]:
        """Count the annotators who rank image a above b, and b above a, for each pair; empty without any."""
        items = value if isinstance(value, list) else [] if value is None else [value]
        rankings = [item.get("rank") if isinstance(item, dict) else None for item in items]
        sound = [ranks for ranks in rankings if isinstance(ranks, list) and len(ranks) == count]
        numbers = [ranks for ranks in ([parse_number(rank) for rank in ranks] for ranks in sound) if None not in ranks]
        if len(numbers) < len(rankings):
            self.remarks["raw_annotations not readable"] += 1
        if not numbers:
            return []
        first, second = np.triu_indices(count, 1)
        ranks = np.array(numbers, dtype=np.float64)
        above, below = ranks[:, first] < ranks[:, second], ranks[:, first] > ranks[:, second]
        return list(zip(above.sum(axis=0).tolist(), below.sum(axis=0).tolist(), strict=True))


class ImageRewardReader(RowReader):
    """Reader of pairs from ImageReward's test set, with 4 to 9 ranked images for each prompt.

    A row of the file gives all pairs of its images, with the row's ``id`` as ``group_id``. Equal ranks are a tie (½).
    Pairs of a row with a null or missing ranking are unlabelled.

    Args:
        root: Folder that holds ``test.json`` and ``test_images/``, directly or in ``data/`` as in the repository;
            images outside ``test_images/`` are not opened.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.
    """

    exif = "ignore"

    def __init__(self, root: PathText, **options: Any) -> None:
        super().__init__("imagereward", "test", **options)
        inner = Path(root, "data")
        file = (inner if (inner / "test.json").is_file() else Path(root)) / "test.json"
        self.folder = file.parent / "test_images"
        self.check_inside(root, file, self.folder)
        parser = PairRowParser(self, self._pairs, sources=())
        self.fill(read_list(file), str(file), f"root: {file} has no pairs left; give the published file", parser)

    def _pairs(self, name: str, row: dict[str, Any]) -> list[Pair]:
        images, ranks = ranked_files(self, name, row, ("generations", "ranking"))
        group_id = name if row.get("id") is None else parse_text(str(row["id"]))
        return ranked_pairs(name, images, ranks, group=name, group_id=group_id)


class ImageRewardDBReader(RowReader):
    """Reader of one split of ImageRewardDB: all pairs of a prompt's images, compared by their ``rank``.

    Rows come from ``metadata-{split}.parquet``. The ``group_id`` is the ``prompt_id``. Images are read from the zip
    files ("parts") when a row is accessed. A part that is unpacked beside its zip file is read from the folder.

    Equal ranks are a tie (½). Pairs of a prompt whose ranks are all null are unlabelled. A path that is missing, or
    that its part does not hold, counts as an unreadable image. The images of a prompt are bad together.

    Args:
        source: Folder with ``metadata-{split}.parquet`` and ``images/{split}/{split}_{i}.zip``.
        split: ``train``, ``validation`` or ``test``.
        parts: Numbers of the parts to read, e.g. ``[1, 2]`` of train's 1 to 32 for a smaller training set. By default
            all parts are read, and parts that the metadata name but the folder lacks fall under ``on_error``.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.
    """

    exif = "ignore"

    def __init__(self, source: PathText, split: str, *, parts: Sequence[int] | None = None, **options: Any) -> None:
        super().__init__("imagerewarddb", split, **options)
        places, metadata = _find_parts(source, split, parts), Path(source, f"metadata-{split}.parquet")
        self.check_inside(source, metadata, *places)
        self._archives = ImageArchives(places, self.allow_outside)
        rows = self._read_metadata(metadata, parts)
        parser = PairRowParser(self, self._pairs, sources=None)
        name = f"{source} {split}"
        self.fill(self._groups(rows), name, f"split: {name} has no pairs left; check the files and parts", parser)

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        places = [(row[name] or "").partition("/") for name in ("image_a", "image_b")]
        return [self._archives.image(part, file) if part else ImageRef("") for part, _, file in places]

    def _read_metadata(self, file: Path, parts: Sequence[int] | None) -> Iterator[tuple[str, str | None, Any]]:
        """Yield (name for messages, part, row) of every row of the metadata that belongs to the parts to read."""
        with damage_named(ParquetPart(file.name, file)):
            table = pq.read_table(whole_file(file), page_checksum_verification=True)
        columns = ["image_path", "prompt_id", "prompt", "rank"]
        if missing := [name for name in columns if name not in table.column_names]:
            raise InputError(f"{file}: no column {', '.join(missing)}; download it again")
        rows = table.select(columns).to_pylist()
        # The part of a path is e.g. train_7 of images/train/train_7/x.webp.
        paths = (row["image_path"] if isinstance(row["image_path"], str) else "" for row in rows)
        found = (re.fullmatch(rf"{re.escape(self.split)}_\d+", PurePosixPath(path).parent.name) for path in paths)
        named = [match and match[0] for match in found]
        absent = {part for part in named if part is not None and part not in self._archives.parts}
        if absent and parts is None:
            first = ", ".join(sorted(absent)[:3])
            problem = f"{self.split} lacks {len(absent)} of its parts ({first}); download them, or set parts"
            self.refuse(str(file), problem, "part missing", len(absent))
        for number, (part, row) in enumerate(zip(named, rows, strict=True)):
            if part not in absent:
                yield f"{file.name}:{number}", part, row

    def _groups(self, rows: Iterator[tuple[str, str | None, Any]]) -> Iterator[Row]:
        """Yield a row for each prompt, with the images and ranks of its rows."""
        groups: dict[str, dict[str, Any]] = {}
        for name, part, row in rows:
            if not isinstance(row, dict) or row.get("prompt_id") is None:
                told = "prompt_id is null or missing" if isinstance(row, dict) else f"{short(row)} is no JSON object"
                self.refuse(name, told, "row without prompt_id" if isinstance(row, dict) else NO_OBJECT)
                continue
            image, path = None, row.get("image_path")
            if part is not None and isinstance(path, str) and path:
                image = f"{part}/{PurePosixPath(parse_text(path) or '').name}"  # parts have no subfolders
            elif self.on_error == "raise":
                self.refuse(name, f"image_path is {short(path)}, not a path to a part", NO_IMAGE)
            prompt_id = parse_text(str(row["prompt_id"])) or ""
            group = groups.setdefault(prompt_id, {"prompt": row.get("prompt"), "images": [], "ranks": []})
            group["images"].append(image)
            group["ranks"].append(row.get("rank"))
        for number, (prompt_id, group) in enumerate(groups.items()):
            yield prompt_id, number, group

    def _pairs(self, name: str, row: dict[str, Any]) -> list[Pair]:
        ranks = parse_ranks(self, "rank", row["ranks"], len(row["images"]))
        return ranked_pairs(name, row["images"], ranks, group=name, group_id=name)


def _find_parts(source: PathText, split: str, parts: Sequence[int] | None) -> list[Path]:
    folder, found = Path(source, "images", split), dict[int, Path]()
    for path in reversed(find_files(folder, "*")):  # a folder comes after its zip file and replaces it
        number = re.fullmatch(rf"{re.escape(split)}_(\d+)(\.zip)?", path.name)
        if number and (path.is_dir() or number[2]):
            found[int(number[1])] = path
    if missing := [number for number in parts or () if number not in found]:
        raise InputError(f"parts: no {split}_{missing[0]}.zip in {folder}; download it, or leave it out")
    if not found:
        raise InputError(f"split: no {split}_*.zip in {folder}; set source to the folder that holds images/{split}")
    return [found[number] for number in sorted(parts or found)]
