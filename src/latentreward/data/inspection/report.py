"""Report of a data set's inspection, as text tables and as JSON."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from latentreward.data.inspection.counts import ImageCounts, Leakage, SplitCounts
from latentreward.data.inspection.score_tables import ScoreCounts
from latentreward.data.mpcf import AESTHETIC_FLOORS

MOST_SIZES = 8
"""Image sizes to list by themselves; the others are summed up."""
OTHER_SIZES = " other sizes"
"""End of the name of the row that sums up sizes, which is the last row of its table."""
ORDER = ("train", "val", "test")
"""Starts of split names, from the earliest split to the latest."""
NO_TEST = {
    "JSONLPairReader": ("configs/data/jsonl.yaml", "--data.test JSONLPairReader --data.test.file FILE"),
    "FolderPairReader": (
        "configs/data/folders.yaml",
        "--data.test FolderPairReader --data.test.root FOLDER --data.test.split test",
    ),
}
"""Reader of pairs of one's own → its YAML file, which sets no ``data.test``, and the flags that set it."""
Cells = Mapping[str, Sequence[str]]

SIDES = (
    "a and b are the two images of a row; %: of the split's rows. Readers of data that names the chosen image first "
    "make it a or b at random."
)
BUCKETS = (
    "Images by aspect bucket (height x width); only `latentreward cache` uses buckets, if its images.size is not set"
)
DROPPED = (
    "Rows whose prompt a later split has; fit leaves them out if its config also sets the later split, as data.val or "
    "data.test (data.shared_prompts: drop; keep keeps them)"
)
STRATEGIES = (
    "multi-preference consistent filtering (floors of the gap chosen - rejected: 0 for clipscore and vqascore; for "
    f"aesthetic {', '.join(f'{floor:g} in strategy {n}' for n, floor in AESTHETIC_FLOORS.items())})"
)


@dataclass
class Report:
    """Results of the inspection of a data set.

    Attributes:
        data: Folder, file or data set that was inspected.
        splits: Counts of each split.
        unread: Split → error, for splits whose reader could not be constructed.
        leakage: Prompts and images that each two splits share.
        scores: Split → counts over the score table.
        scores_note: Split → reason why it has no counts over the score table.
        decoded: Whether images were decoded; otherwise only their headers were read.
        complete: False if an interrupt ended the inspection early.
        others: Reader and splits of each format that was also found but not read → flags that read it.
    """

    data: str
    splits: list[SplitCounts] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    leakage: list[Leakage] = field(default_factory=list)
    scores: dict[str, ScoreCounts] = field(default_factory=dict)
    scores_note: dict[str, str] = field(default_factory=dict)
    decoded: bool = False
    complete: bool = True
    others: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the report as dicts, lists and plain values; image sizes become keys ``HEIGHTxWIDTH``."""
        return _plain(self)

    def to_text(self) -> str:
        """Return the report as text tables with one column per split."""
        how = "all were decoded" if self.decoded else "by their headers; --decode also finds truncated ones"
        sections = [
            f"{self.data} ({', '.join(dict.fromkeys(split.reader for split in self.splits))})",
            *(f"also found, not read: {reader}; read it with {flags}" for reader, flags in self.others.items()),
            *(f"split {name} was not read: {problem}" for name, problem in self.unread.items()),
            self._table("", _overview(self.splits)),
            SIDES,
            self._table("Sizes (height x width, most frequent)", self._by(_most_frequent_sizes)),
            self._table(BUCKETS, self._by(lambda split: _images(split).buckets)),
            self._table("Clips (by their headers)", self._by(lambda split: _images(split).clips)),
            self._of_images("Odd images", lambda images: images.odd),
            self._table("Rows left out", self._by(lambda split: split.skipped)) or "Rows left out: none",
            self._table("Rows kept with a remark", self._by(lambda split: split.remarks)),
            self._named(),
            self._of_images("Doubtful rows", lambda images: images.doubtful),
            self._first_doubtful(),
            self._of_images(f"Rows with unreadable images ({how})", lambda images: images.unreadable_rows),
            self._first_unreadable(),
            _leakage_table(self.leakage),
            _dropped_table(self.leakage, {split.name: split.rows for split in self.splits}),
            self._trained_test_prompts(),
            *(_score_tables(name, counts) for name, counts in self.scores.items()),
            *(f"split {name} has no scores: {note}" for name, note in self.scores_note.items()),
        ]
        if not self.complete:
            sections.append("Interrupted: the counts above are those of the rows looked at so far.")
        return "\n\n".join(section for section in sections if section)

    def _table(self, title: str, rows: Cells) -> str:
        return table(title, [split.name for split in self.splits], rows)

    def _by(self, counts_of: Callable[[SplitCounts], Mapping[str, int]]) -> Cells:
        """Return table rows of counts by reason, for every reason in any split: frequent first, other sizes last."""
        found = [counts_of(split) for split in self.splits]
        reasons = dict.fromkeys(reason for counts in found for reason in counts)
        totals = {reason: sum(counts.get(reason, 0) for counts in found) for reason in reasons}
        ordered = sorted(reasons, key=lambda reason: (reason.endswith(OTHER_SIZES), -totals[reason]))
        return {reason: [str(counts.get(reason, 0)) for counts in found] for reason in ordered}

    def _of_images(self, title: str, counts_of: Callable[[ImageCounts], Mapping[str, int]]) -> str:
        """Return a table about images, or a line that there are none; empty if no images were looked at."""
        if all(split.images is None for split in self.splits):
            return ""
        return self._table(title, self._by(lambda split: counts_of(_images(split)))) or f"{title}: none"

    def _named(self) -> str:
        rows = [(split.name, *named) for split in self.splits for named in split.named.items()]
        return _lines("The first of these rows", [f"{name}, {why}: {', '.join(names)}" for name, why, names in rows])

    def _first_doubtful(self) -> str:
        lines = [f"{split.name}, {line}" for split in self.splits for line in _images(split).first_doubtful]
        return _lines("Doubtful rows (rows count from 0)", lines)

    def _first_unreadable(self) -> str:
        lines = []
        for split in self.splits:
            images = _images(split)
            lines += [f"{split.name}, {line}" for line in images.first_unreadable]
            if rest := images.unreadable - len(images.first_unreadable):
                lines.append(f"{split.name}: and {rest} more images")
        return _lines("Unreadable images (rows count from 0)", lines)

    def _trained_test_prompts(self) -> str:
        """Return a line on test prompts that training would use, for readers whose YAML file sets no test split."""
        readers = {split.name: split.reader for split in self.splits}
        lines = []
        for leak in self.leakage:
            name, test = sorted((leak.first, leak.second), key=lambda split: split.startswith("test"))
            if (
                name.startswith("train")
                and test.startswith("test")
                and leak.shared["prompts"]
                and readers[test] in NO_TEST
            ):
                config, flags = NO_TEST[readers[test]]
                lines.append(
                    f"{leak.shared['prompts']} prompts of {test} are also in {name}. {config} sets no data.test: fit "
                    f"then trains on these prompts, and numbers on {test} are too good. Set data.test, so that fit "
                    f"leaves their rows out: {flags}"
                )
        return "\n".join(lines)


def _lines(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *lines]) if lines else ""


def _plain(value: Any) -> Any:
    """Convert dataclasses and mappings to dicts with text keys, and sequences to lists."""
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else "x".join(map(str, key)): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def table(title: str, columns: Sequence[str], rows: Cells) -> str:
    """Format a text table with a title and right-aligned columns; empty text if there are no rows."""
    if not rows:
        return ""
    first = max(map(len, rows))
    widths = [max(len(column), *(len(cells[n]) for cells in rows.values())) for n, column in enumerate(columns)]

    def line(name: str, cells: Iterable[str]) -> str:
        return "  ".join([f"{name:{first}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))])

    head = line("", columns)
    lines = [head.rstrip(), "-" * len(head), *(line(name, cells).rstrip() for name, cells in rows.items())]
    return "\n".join([title, *lines] if title else lines)


def _overview(splits: Sequence[SplitCounts]) -> Cells:
    rows: dict[str, list[str]] = {"rows": [str(split.rows) for split in splits]}
    for label in splits[0].labels if splits else ():
        rows[f"  {label}"] = [_with_share(split.labels[label], split.rows) for split in splits]
    rows["distinct prompts"] = [str(split.distinct_prompts) for split in splits]
    for name in next((split.prompt_lengths for split in splits if split.prompt_lengths), ()):
        rows[f"  characters, {name}"] = [str(split.prompt_lengths.get(name, "-")) for split in splits]
    rows["rows whose images were looked at"] = [_of_images(split, lambda images: images.rows) for split in splits]
    rows["distinct images"] = [_of_images(split, lambda images: images.distinct) for split in splits]
    rows["rows with images of two buckets"] = [_of_images(split, lambda images: images.mixed_rows) for split in splits]
    return rows


def _of_images(split: SplitCounts, count: Callable[[ImageCounts], int]) -> str:
    return "-" if split.images is None else str(count(split.images))


def _with_share(number: int, total: int) -> str:
    return f"{number} ({100 * number / total:.1f} %)" if total else str(number)


def _images(split: SplitCounts) -> ImageCounts:
    return split.images or ImageCounts()


def _most_frequent_sizes(split: SplitCounts) -> dict[str, int]:
    sizes = _images(split).sizes
    frequent = {f"{height}x{width}": count for (height, width), count in sizes.most_common(MOST_SIZES)}
    rest = sizes.total() - sum(frequent.values())
    return frequent | ({f"{len(sizes) - MOST_SIZES}{OTHER_SIZES}": rest} if rest else {})


def _leakage_table(leaks: Sequence[Leakage]) -> str:
    rows = {}
    for leak in leaks:
        for what, number in leak.shared.items():
            cells = [str(number), str(leak.first_rows[what]), str(leak.second_rows[what])]
            rows[f"{leak.first} and {leak.second}: {what}"] = cells
    return table("Shared between splits", ["shared", "rows of the first", "rows of the second"], rows)


def _dropped_table(leaks: Sequence[Leakage], rows: Mapping[str, int]) -> str:
    """Return the table of rows whose prompt a later split has, which training may leave out.

    Pairs of splits whose order ``ORDER`` does not give are left out.
    """
    dropped = {}
    for leak in leaks:
        sides = [(leak.first, leak.first_rows["prompts"]), (leak.second, leak.second_rows["prompts"])]
        places = [number for name, _ in sides for number, kind in enumerate(ORDER) if name.startswith(kind)]
        if len(set(places)) == len(sides) and leak.shared["prompts"]:
            (name, lost), (later, _) = sides if places == sorted(places) else sides[::-1]
            dropped[f"{name} beside {later}"] = [f"{lost} of {rows[name]}"]
    return table(DROPPED, ["rows"], dropped)


def _score_tables(name: str, counts: ScoreCounts) -> str:
    scorers = {
        scorer: [str(found.pairs), _with_share(found.below, found.pairs), str(found.equal), str(found.missing)]
        for scorer, found in counts.scorers.items()
    }
    columns = ["decided pairs", "chosen scores below rejected", "equal", "no score"]
    strategies = {
        f"strategy {kept.strategy}, {'>' if kept.comparison == 'code' else '≥'} as in the {kept.comparison}": [
            _with_share(kept.decided + kept.ties, counts.rows),
            str(kept.decided),
            str(kept.ties),
        ]
        for kept in counts.strategies
    }
    parts = [
        table(f"Scores of {name}", columns, scorers),
        table(
            f"Rows of {name} that the table says nothing of",
            ["rows"],
            {k: [str(n)] for k, n in counts.problems.items()},
        ),
        table(f"Kept of {name} by {STRATEGIES}", ["rows", "decided", "ties"], strategies),
        f"Filter strategies were not tried: {counts.note}" if counts.note else "",
    ]
    return "\n\n".join(part for part in parts if part)
