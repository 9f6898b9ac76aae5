"""What is counted over a data set: labels, images, leakage, score tables."""

import math
import re
from collections import Counter
from io import BytesIO

import numpy as np
import pytest

from latentreward.contracts import EditPrompt, ImageRef, PreferencePair
from latentreward.data import PairReader
from latentreward.data.buckets import sort_buckets
from latentreward.data.inspection.counts import (
    ImageCensus,
    SplitContents,
    count_labels,
    find_leakage,
    inspect_reader,
    inspect_scores,
    quantiles,
)
from latentreward.data.inspection.report import Report, table
from latentreward.data.score_table import PairGaps
from latentreward.errors import InputError
from tests.data.rotated import photograph


class Pairs(PairReader):
    """Rows of (prompt, bytes of a, bytes of b, label); images are named by their number in the list of all."""

    def __init__(self, *rows: tuple[str, bytes, bytes, float | None], stop_at: int | None = None) -> None:
        super().__init__("skip")
        self.rows, self.stop_at = rows, stop_at
        self.skipped["a reason"] = 2
        self.names = sorted({data for row in rows for data in row[1:3]})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PreferencePair:
        if index == self.stop_at:
            raise KeyboardInterrupt
        prompt, *images, label = self.rows[index]
        a, b = (ImageRef(str(self.names.index(data)), data) for data in images)
        return PreferencePair(str(index), prompt, a, b, label)

    def labels(self) -> np.ndarray:
        return np.array([math.nan if row[3] is None else row[3] for row in self.rows])

    def prompts(self) -> list[str]:
        return [row[0] for row in self.rows]


def test_rows_labels_prompts_and_images(jpeg) -> None:
    big, wide, small = jpeg(size=(512, 512)), jpeg(size=(832, 1248)), jpeg(size=(20, 20))
    odd = jpeg(size=(700, 600))
    reader = Pairs(
        ("a", big, wide, 1.0),
        ("a", big, small, 0.0),
        ("A cat", big, odd, 0.5),
        ("", big, b"garbage", None),
        ("b", b"", b"garbage", 0.3),
        ("b", big, big, 0.8),
    )
    counts, contents = inspect_reader("train", reader, ImageCensus())
    assert (counts.rows, counts.reader, counts.complete) == (6, "Pairs", True)
    assert counts.labels == {"a wins": 2, "b wins": 2, "ties": 1, "unlabelled": 1}
    assert counts.distinct_prompts == 4
    assert counts.prompt_lengths == {"min": 0, "25%": 1, "median": 1, "75%": 1, "95%": 5, "max": 5}
    images = counts.images
    assert images is not None
    assert (images.rows, images.distinct, images.mixed_rows) == (6, 6, 3)
    assert images.sizes == {(512, 512): 1, (1248, 832): 1, (20, 20): 1, (600, 700): 1}
    assert images.buckets == {
        "512x512": 1,
        "1248x832": 1,
        "below 65536 pixels": 1,
        "no bucket of this aspect ratio": 1,
    }
    assert images.unreadable_rows == {"unknown image format": 1, "empty image": 1}
    assert counts.skipped == {"a reason": 2}
    assert contents.prompts == ["a", "a", "a cat", "", "b", "b"]
    assert contents.hashes[0, 0] == contents.hashes[1, 0] != 0
    assert contents.hashes[4].tolist() == [0, 0]


def test_doubtful_rows_are_named(jpeg) -> None:
    first, second, third = (jpeg((90 * n, 9, 9)) for n in range(3))
    reader = Pairs(
        ("a", first, second, 1.0),
        ("a", first, first, 0.5),
        ("A ", second, first, 0.2),
        ("a", second, first, 0.9),
        ("a", first, second, 0.5),
        ("b", first, second, 0.0),
        ("a", first, third, None),
        ("a", third, first, 1.0),
        ("a", b"", b"", 1.0),
        ("a", b"", b"", 0.0),
    )
    for census in (ImageCensus(), ImageCensus(hash_bytes=False)):
        counts, _ = inspect_reader("train", reader, census)
        told = counts.images.first_doubtful
        assert told[:4] == [
            "row 1, pair 1: same image on both sides",
            "row 2, pair 2: pair of an earlier row (0)",
            "row 3, pair 3: other winner than an earlier row (0)",
            "row 4, pair 4: pair of an earlier row (0)",
        ]
        assert told[4].startswith("row 7, pair 7: pair of an earlier row (6)")
    text = Report("data", [counts]).to_text()
    assert "train, row 3, pair 3: other winner than an earlier row (0)" in text


def test_latents_with_a_time_axis_are_whole() -> None:
    census, images = ImageCensus(), []
    for shape in ((4, 32, 48), (4, 1, 32, 48), (32, 48)):
        stream = BytesIO()
        np.save(stream, np.zeros(shape, np.float16))
        images.append(ImageRef(str(shape), stream.getvalue(), holds="latents"))
    for other in images[1:]:
        census.add(PreferencePair("a", "a cat", images[0], other, 1.0))
    assert census.counts.sizes == {(256, 384): 2}
    assert census.counts.unreadable == 1
    assert "(32, 48) is not a (C, h, w) or (C, T, h, w) array" in census.counts.first_unreadable[0]


def test_only_decoding_finds_a_truncated_image(jpeg) -> None:
    reader = Pairs(("a", jpeg(size=(64, 64)), jpeg(size=(64, 64))[:-40], 1.0))
    for decode in (False, True):
        counts, _ = inspect_reader("train", reader, ImageCensus(decode=decode))
        assert counts.images.unreadable_rows == ({"truncated or damaged image": 1} if decode else {})


def test_own_buckets_and_a_limit(jpeg) -> None:
    reader = Pairs(("a", jpeg(size=(20, 20)), jpeg(size=(24, 16)), 1.0), ("b", b"", b"", 1.0))
    census = ImageCensus(sort_buckets([(32, 32)]), hash_bytes=False, min_pixels=0)
    counts, contents = inspect_reader("train", reader, census, limit=1)
    assert counts.images.buckets == {"32x32": 1, "no bucket of this aspect ratio": 1}
    assert (counts.images.rows, counts.rows, counts.complete) == (1, 2, True)
    assert not contents.hashes.any()
    assert inspect_reader("train", reader, ImageCensus(), limit=0)[0].images is None
    with pytest.raises(InputError, match="limit=-1 must be at least 0"):
        inspect_reader("train", reader, ImageCensus(), limit=-1)


def test_an_interrupt_keeps_what_was_counted(jpeg) -> None:
    reader = Pairs(*[("a", jpeg(), jpeg(), 1.0)] * 5, stop_at=3)
    counts, _ = inspect_reader("train", reader, ImageCensus())
    assert (counts.complete, counts.images.rows, counts.rows) == (False, 3, 5)


def test_a_reader_without_images_is_not_asked_for_them() -> None:
    reader = Pairs(("a", b"", b"", 1.0), stop_at=0)
    reader.holds = "nothing"
    counts, contents = inspect_reader("train", reader, ImageCensus())
    assert counts.images is None
    assert contents.hashes.shape == (0, 2)


def test_counts_by_hand() -> None:
    labels = np.array([1.0, 0.7, 0.5, 0.2, math.nan])
    assert count_labels(labels) == {"a wins": 2, "b wins": 1, "ties": 1, "unlabelled": 1}
    assert quantiles(range(1, 101)) == {"min": 1, "25%": 25, "median": 50, "75%": 75, "95%": 95, "max": 100}
    assert quantiles([]) == {}


def test_leakage_by_prompt_name_and_content() -> None:
    train = SplitContents(
        ["a cat", "a cat", "b"], [("x", "y"), ("", "z"), ("z", "x")], np.array([[1, 2], [0, 3], [3, 1]])
    )
    test = SplitContents(["a cat", "c"], [("q", ""), ("z", "w")], np.array([[0, 7], [3, 3]]))
    leak = find_leakage("train", "test", (train, test))
    assert leak.shared == {"prompts": 1, "image names": 1, "image contents": 1}
    assert leak.first_rows == {"prompts": 2, "image names": 2, "image contents": 2}
    assert leak.second_rows == {"prompts": 1, "image names": 1, "image contents": 1}


def test_pictures_that_splits_edit_by_unlike_instructions_are_counted(jpeg) -> None:
    pictures = [ImageRef(name, jpeg()) for name in "pq"]
    instructions = [("make it red", pictures[:1]), ("add a dog", pictures), ("add a cat", pictures[1:])]
    readers = [
        Pairs(*((EditPrompt(*one), jpeg(), jpeg(), 1.0) for one in part))
        for part in (instructions[:2], instructions[2:])
    ]
    contents = [inspect_reader(name, reader, ImageCensus())[1] for name, reader in zip("ab", readers, strict=True)]
    leak = find_leakage("a", "b", (contents[0], contents[1]))
    assert (leak.shared["prompts"], leak.shared["pictures to edit"]) == (0, 1)
    assert (leak.first_rows["pictures to edit"], leak.second_rows["pictures to edit"]) == (1, 1)


def gaps(decided: list[bool], **values: list[float]) -> PairGaps:
    arrays = {name: np.array(numbers) for name, numbers in values.items()}
    return PairGaps(np.array(decided), arrays, {"unlabelled": np.array([False] * (len(decided) - 1) + [True])})


def test_scores_against_labels_and_strategies() -> None:
    nan = math.nan
    aesthetic = [0.1, -0.3, 0.0, nan, 0.1, 9.0]
    found = inspect_scores(
        gaps(
            [True, True, True, True, False, False],
            aesthetic=aesthetic,
            clipscore=[0.1] * 4 + [0.01] * 2,
            vqascore=[0.1] * 4 + [0.01] * 2,
        )
    )
    counts = found.scorers["aesthetic"]
    assert (counts.pairs, counts.below, counts.equal, counts.missing) == (3, 1, 1, 1)
    assert counts.share_below == pytest.approx(1 / 3)
    assert found.problems == {"unlabelled": 1}
    kept = {(item.strategy, item.comparison): (item.decided, item.ties) for item in found.strategies}
    assert kept == {
        (1, "code"): (1, 1),
        (1, "paper"): (2, 1),
        (2, "code"): (3, 1),
        (2, "paper"): (3, 1),
        (3, "code"): (3, 1),
        (3, "paper"): (3, 1),
    }
    assert all(item.decided + item.ties + item.dropped.total() == 6 for item in found.strategies)


def test_a_table_without_the_scorers_of_the_strategies_says_so() -> None:
    found = inspect_scores(gaps([False, False], pickscore=[0.1, 0.2]))
    assert found.scorers["pickscore"].share_below is None
    assert not found.strategies
    assert "no 'aesthetic'" in found.note
    text = Report("data", scores={"train": found}).to_text()
    assert "Filter strategies were not tried: the score table has no 'aesthetic'" in text


def test_tables_are_aligned() -> None:
    assert table("Title", ["x", "long"], {"a": ["1", "2"], "bb": ["333", "4"]}).splitlines() == [
        "Title",
        "    x    long",
        "a   1    2",
        "bb  333  4",
    ]
    assert table("Title", ["x"], {}) == ""


def test_reasons_of_all_splits_share_a_table(jpeg) -> None:
    report = Report("data")
    for name, reason, number in (("train", "few", 1), ("test", "many", 7)):
        reader = Pairs(("a", jpeg(), jpeg(), 1.0))
        reader.skipped = Counter({reason: number})
        report.splits.append(inspect_reader(name, reader, ImageCensus())[0])
    lines = report.to_text().splitlines()
    assert lines[lines.index("Rows left out") + 1 :][:3] == [
        "      train  test",
        "many  0      7",
        "few   1      0",
    ]
    assert report.to_json()["splits"][0]["images"]["sizes"] == {"12x20": 1}


def test_other_sizes_are_last(jpeg) -> None:
    report = Report("data")
    for name, largest in (("train", 40), ("test", 50)):
        images = [jpeg(size=(20, side)) for side in range(20, largest)]
        reader = Pairs(*(("a", image, image, 1.0) for image in images))
        report.splits.append(inspect_reader(name, reader, ImageCensus())[0])
    lines = report.to_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("Sizes"))
    names = [line[: line.index("  ")] for line in lines[first + 2 : lines.index("", first)]]
    assert names[-2:] == ["22 other sizes", "12 other sizes"]
    assert not any("other" in name for name in names[:-2])


@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_odd_images_are_counted_once_each(jpeg, exif) -> None:
    plain, small, single = jpeg(size=(512, 512)), jpeg(size=(20, 20)), jpeg(size=(1, 1))
    turned = photograph(6, 832, 1248)
    ink = jpeg(size=(256, 256), mode="CMYK", color=(1, 2, 3, 4))
    reader = Pairs(("a", plain, turned, 1.0), ("a", turned, small, 1.0), ("b", single, ink, 0.0))
    reader.exif = exif
    found, _ = inspect_reader("train", reader, ImageCensus(exif=reader.exif))
    assert found.images is not None
    told = "upright (exif: apply)" if exif == "apply" else "not turned (exif: ignore)"
    assert {key.split(", ", 1)[1]: count for key, count in found.images.odd.items() if key.startswith("EXIF")} == {
        told if exif == "ignore" else f"turned {told}": 1
    }
    others = {key: count for key, count in found.images.odd.items() if not key.startswith("EXIF")}
    assert others == {
        "fewer pixels than the smallest bucket, 256x256": 2,
        "a single pixel": 1,
        "CMYK, which becomes RGB": 1,
    }
    assert found.images.sizes[(832, 1248) if exif == "apply" else (1248, 832)] == 1
    text = Report("data", [found]).to_text()
    assert "Odd images" in text
    assert "a single pixel" in text


def test_edits_are_counted_by_their_pictures_and_told_apart_by_them(jpeg) -> None:
    pictures = [ImageRef(name, data) for name, data in (("p", jpeg()), ("q", jpeg((1, 2, 3))), ("odd", b"garbage"))]
    instructions = [EditPrompt("make it red", sources) for sources in (pictures[:1], pictures[1:2], pictures[:2])]
    rows = [(prompt, jpeg((9, 90, 9)), jpeg((90, 9, 9)), 1.0) for prompt in instructions]
    reader = Pairs(*rows, ("a cat", *rows[0][1:]), (EditPrompt("make it red", pictures[2:]), *rows[0][1:]))
    counts, contents = inspect_reader("train", reader, ImageCensus())
    assert (counts.edits, counts.distinct_prompts) == ({"1": 3, "2": 1}, 5)
    assert counts.images is not None
    assert (counts.images.sources, counts.images.distinct, counts.images.unreadable) == (3, 2, 1)
    assert counts.images.unreadable_rows == {"unknown image format": 1}
    assert counts.images.first_unreadable[0].startswith("row 4, pair 4: image 'odd': unknown image format")
    assert not counts.images.doubtful  # the same results of unlike pictures are no repeated pair
    assert len(set(contents.prompts)) == 5
    text = Report("data", [counts]).to_text()
    for line in (
        r"edits +4 \(80\.0 %\)",
        "  of 1 picture +3",
        "  of 2 pictures +1",
        "distinct pictures to edit, by name +3",
    ):
        assert re.search(line, text), line
    wide = jpeg((9, 9, 90), size=(64, 96))
    reader = Pairs(*rows, (instructions[0], rows[0][1], wide, 1.0))
    images = inspect_reader("train", reader, ImageCensus())[0].images
    assert images is not None and images.doubtful == {"image of another aspect ratio than what was edited": 1}
    assert images.first_doubtful == ["row 3, pair 3: image of another aspect ratio than what was edited"]
    plain = inspect_reader("train", Pairs(("a", *rows[0][1:])), ImageCensus())[0]
    assert "edit" not in Report("data", [plain]).to_text()
