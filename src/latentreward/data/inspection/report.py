"""Report of a data set's inspection, as text tables and as JSON."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from latentreward.data.inspection.counts import ImageCounts, Leakage, ScoreCounts, SplitCounts
from latentreward.data.mpcf import AESTHETIC_FLOORS
from latentreward.reports.tables import NOTHING, Table, as_text

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
    """Results of the inspection of a data set."""

    data: str  # folder, file or data set that was inspected
    splits: list[SplitCounts] = field(default_factory=list)  # counts of each split
    unread: dict[str, str] = field(default_factory=dict)  # split → why its reader could not be constructed
    leakage: list[Leakage] = field(default_factory=list)  # prompts and images that each two splits share
    scores: dict[str, ScoreCounts] = field(default_factory=dict)  # split → counts over the score table
    scores_note: dict[str, str] = field(default_factory=dict)  # split → why it has no counts over the score table
    decoded: bool = False  # whether images were decoded; otherwise only their headers were read
    complete: bool = True  # false if an interrupt ended the inspection early
    others: dict[str, str] = field(default_factory=dict)  # other formats found: reader and splits → flags that read it

    def to_json(self) -> dict[str, Any]:
        """Return the report as dicts, lists and plain values; image sizes become keys ``HEIGHTxWIDTH``."""
        return _plain(self)

    def to_text(self) -> str:
        """Return the report as text tables with one column per split."""
        how = "all were decoded" if self.decoded else "by their headers; --decode also finds truncated ones"
        splits = {split.name: split for split in self.splits}
        images = {split.name: split.images or ImageCounts() for split in self.splits}
        looked_at = any(split.images for split in self.splits)

        def counts(title: str, counts_of: Callable[[str], Mapping[str, int]], none: bool = False) -> str:
            """Format counts by reason of every split; with ``none``, say that there are none."""
            found = [counts_of(name) for name in splits]
            reasons = dict.fromkeys(reason for counts in found for reason in counts)
            rows = {reason: [counts.get(reason, 0) for counts in found] for reason in reasons}
            # Frequent reasons come first, other sizes last.
            rows = dict(sorted(rows.items(), key=lambda row: (row[0].endswith(OTHER_SIZES), -sum(row[1]))))
            return table(title, [*splits], rows) or (f"{title}: none" if none else "")

        def of_images(title: str, field_name: str) -> str:
            return counts(title, lambda name: getattr(images[name], field_name), none=True) if looked_at else ""

        named = [(split.name, *named) for split in self.splits for named in split.named.items()]
        unreadable = []
        for name, found in images.items():
            unreadable += [f"{name}, {line}" for line in found.first_unreadable]
            if rest := found.unreadable - len(found.first_unreadable):
                unreadable.append(f"{name}: and {rest} more images")
        trained_on = []
        for leak in self.leakage:  # test prompts that training would use, as the YAML file sets no test split
            name, test = sorted((leak.first, leak.second), key=lambda split: split.startswith("test"))
            apart = name.startswith("train") and test.startswith("test")
            if apart and leak.shared["prompts"] and splits[test].reader in NO_TEST:
                config, flags = NO_TEST[splits[test].reader]
                trained_on.append(
                    f"{leak.shared['prompts']} prompts of {test} are also in {name}. {config} sets no data.test: fit "
                    f"then trains on these prompts, and numbers on {test} are too good. Set data.test, so that fit "
                    f"leaves their rows out: {flags}"
                )
        sections = [
            f"{self.data} ({', '.join(dict.fromkeys(split.reader for split in self.splits))})",
            *(f"also found, not read: {reader}; read it with {flags}" for reader, flags in self.others.items()),
            *(f"split {name} was not read: {problem}" for name, problem in self.unread.items()),
            table("", [*splits], overview(self.splits)),
            SIDES,
            counts("Sizes (height x width, most frequent)", lambda name: frequent_sizes(images[name])),
            counts(BUCKETS, lambda name: images[name].buckets),
            counts("Clips (by their headers)", lambda name: images[name].clips),
            of_images("Odd images", "odd"),
            counts("Rows left out", lambda name: splits[name].skipped, none=True),
            counts("Rows kept with a remark", lambda name: splits[name].remarks),
            _lines("The first of these rows", [f"{name}, {why}: {', '.join(pairs)}" for name, why, pairs in named]),
            of_images("Doubtful rows", "doubtful"),
            _lines(
                "Doubtful rows (rows count from 0)",
                [f"{name}, {line}" for name, found in images.items() for line in found.first_doubtful],
            ),
            of_images(f"Rows with unreadable images ({how})", "unreadable_rows"),
            _lines("Unreadable images (rows count from 0)", unreadable),
            table(
                "Shared between splits",
                ["shared", "rows of the first", "rows of the second"],
                {
                    f"{leak.first} and {leak.second}: {what}": [number, leak.first_rows[what], leak.second_rows[what]]
                    for leak in self.leakage
                    for what, number in leak.shared.items()
                },
            ),
            table(DROPPED, ["rows"], dropped_rows(self.leakage, splits)),
            *trained_on,
            *(part for name, found in self.scores.items() for part in score_tables(name, found)),
            *(f"split {name} has no scores: {note}" for name, note in self.scores_note.items()),
        ]
        if not self.complete:
            sections.append("Interrupted: the counts above are those of the rows looked at so far.")
        return "\n\n".join(section for section in sections if section)


def table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[object]]) -> str:
    """Format a table of named rows below its title; empty text if there are no rows."""
    text = as_text(Table(("", *columns), tuple((name, *map(str, cells)) for name, cells in rows.items())))
    return "\n".join(filter(None, [title, text])) if rows else ""


def _lines(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *lines]) if lines else ""


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else "x".join(map(str, key)): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def overview(splits: Sequence[SplitCounts]) -> dict[str, list[object]]:
    """Return the table rows of rows, labels, prompts and images of each split."""
    rows: dict[str, list[object]] = {"rows": [split.rows for split in splits]}
    for label in splits[0].labels if splits else ():
        rows[f"  {label}"] = [_with_share(split.labels[label], split.rows) for split in splits]
    if any(split.edits for split in splits):
        rows["edits"] = [_with_share(sum(split.edits.values()), split.rows) for split in splits]
        for number in sorted({number for split in splits for number in split.edits}, key=int):
            rows[f"  of {number} picture{'s' * (number != '1')}"] = [split.edits.get(number, 0) for split in splits]
        rows["distinct pictures to edit, by name"] = [getattr(split.images, "sources", NOTHING) for split in splits]
    rows["distinct prompts"] = [split.distinct_prompts for split in splits]
    for name in next((split.prompt_lengths for split in splits if split.prompt_lengths), ()):
        rows[f"  characters, {name}"] = [split.prompt_lengths.get(name, NOTHING) for split in splits]
    for title, count in (
        ("rows whose images were looked at", "rows"),
        ("distinct images, by name", "distinct"),
        ("rows with images of two buckets", "mixed_rows"),
    ):
        rows[title] = [getattr(split.images, count, NOTHING) for split in splits]
    return rows


def _with_share(number: int, total: int) -> str:
    return f"{number} ({100 * number / total:.1f} %)" if total else str(number)


def frequent_sizes(images: ImageCounts) -> dict[str, int]:
    """Return the numbers of images of the most frequent sizes, and of all others."""
    frequent = {f"{height}x{width}": count for (height, width), count in images.sizes.most_common(MOST_SIZES)}
    rest = images.sizes.total() - sum(frequent.values())
    return frequent | ({f"{len(images.sizes) - MOST_SIZES}{OTHER_SIZES}": rest} if rest else {})


def dropped_rows(leaks: Sequence[Leakage], splits: Mapping[str, SplitCounts]) -> dict[str, list[str]]:
    """Return the table rows of splits with prompts of a later split, which training may leave out.

    Pairs of splits whose order ``ORDER`` does not give are left out.
    """
    dropped = {}
    for leak in leaks:
        sides = [(leak.first, leak.first_rows["prompts"]), (leak.second, leak.second_rows["prompts"])]
        places = [number for name, _ in sides for number, kind in enumerate(ORDER) if name.startswith(kind)]
        if len(set(places)) == len(sides) and leak.shared["prompts"]:
            (name, lost), (later, _) = sides if places == sorted(places) else sides[::-1]
            dropped[f"{name} beside {later}"] = [f"{lost} of {splits[name].rows}"]
    return dropped


def score_tables(name: str, counts: ScoreCounts) -> list[str]:
    """Return the tables of a split's scores, of rows without scores, and of what each filter keeps."""
    scorers = {
        scorer: [found.pairs, _with_share(found.below, found.pairs), found.equal, found.missing]
        for scorer, found in counts.scorers.items()
    }
    strategies = {
        f"strategy {kept.strategy}, {'>' if kept.comparison == 'code' else '≥'} as in the {kept.comparison}": [
            _with_share(kept.decided + kept.ties, counts.rows),
            kept.decided,
            kept.ties,
        ]
        for kept in counts.strategies
    }
    problems = {reason: [number] for reason, number in counts.problems.items()}
    return [
        table(f"Scores of {name}", ["decided pairs", "chosen scores below rejected", "equal", "no score"], scorers),
        table(f"Rows of {name} that the table says nothing of", ["rows"], problems),
        table(f"Kept of {name} by {STRATEGIES}", ["rows", "decided", "ties"], strategies),
        f"Filter strategies were not tried: {counts.note}" if counts.note else "",
    ]
