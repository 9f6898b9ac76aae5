"""What is counted over a data set: labels, images, bad rows, shared prompts."""

import math
from io import BytesIO

import numpy as np
import pytest

from latentreward.core.contracts import EditPrompt, ImageRef, PreferencePair
from latentreward.core.errors import InputError
from latentreward.data import PairReader
from latentreward.data.inspection import ImageCensus, Report, inspect_reader, shared_prompts
from tests.data.rotated import photograph


class Pairs(PairReader):
    """Rows of (prompt, bytes of a, bytes of b, label); images are named by their number in the list of all."""

    def __init__(self, *rows: tuple[str, bytes, bytes, float | None]) -> None:
        super().__init__("skip")
        self.rows = rows
        self.skipped["a reason"] = 2
        self.names = sorted({data for row in rows for data in row[1:3]})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PreferencePair:
        prompt, *images, label = self.rows[index]
        a, b = (ImageRef(str(self.names.index(data)), data) for data in images)
        return PreferencePair(str(index), prompt, a, b, label)

    def labels(self) -> np.ndarray:
        return np.array([math.nan if row[3] is None else row[3] for row in self.rows])

    def prompts(self) -> list[str]:
        return [row[0] for row in self.rows]


def test_rows_labels_prompts_and_images(jpeg) -> None:
    big, wide, small, other = (jpeg(size=size) for size in ((512, 512), (832, 1248), (20, 20), (700, 600)))
    reader = Pairs(
        ("a", big, wide, 1.0),
        ("a", big, small, 0.0),
        ("A cat", big, other, 0.5),
        ("", big, b"garbage", None),
        ("b", b"", b"garbage", 0.3),
    )
    counts = inspect_reader("train", reader)
    assert (counts.rows, counts.reader, counts.distinct_prompts, counts.edits) == (5, "Pairs", 4, {0: 5})
    assert counts.labels == {"a wins": 1, "b wins": 2, "ties": 1, "unlabelled": 1}
    images = counts.images
    assert images is not None
    assert (images.rows, images.distinct, images.unreadable) == (5, 6, 2)
    assert images.sizes == {"512x512": 1, "1248x832": 1, "20x20": 1, "600x700": 1}
    assert images.unreadable_rows == {"unknown image format": 1, "empty image": 1}
    assert counts.skipped == {"a reason": 2}
    assert "edits" not in Report("data", splits=[counts]).to_text()


def test_latents_with_a_time_axis_are_whole() -> None:
    census, images = ImageCensus(), []
    for shape in ((4, 32, 48), (4, 1, 32, 48), (32, 48)):
        stream = BytesIO()
        np.save(stream, np.zeros(shape, np.float16))
        images.append(ImageRef(str(shape), stream.getvalue(), holds="latents"))
    for other in images[1:]:
        census.add(PreferencePair("a", "a cat", images[0], other, 1.0))
    assert census.counts.sizes == {"256x384": 2}
    assert "(32, 48) is not a (C, h, w) or (C, T, h, w) array" in census.counts.first_unreadable[0]


@pytest.mark.parametrize("decode", [False, True])
def test_only_decoding_finds_a_truncated_image(decode: bool, jpeg) -> None:
    reader = Pairs(("a", jpeg(size=(64, 64)), jpeg(size=(64, 64))[:-40], 1.0))
    images = inspect_reader("train", reader, decode).images
    assert images is not None and images.unreadable_rows == ({"truncated or damaged image": 1} if decode else {})


def test_a_limit(jpeg) -> None:
    reader = Pairs(("a", jpeg(), jpeg((1, 2, 3)), 1.0), ("b", b"", b"", 1.0))
    counts = inspect_reader("train", reader, limit=1)
    assert counts.images is not None and (counts.images.rows, counts.rows) == (1, 2)
    assert inspect_reader("train", reader, limit=0).images is None
    reader.holds = "nothing"
    assert inspect_reader("train", reader).images is None
    with pytest.raises(InputError, match="limit=-1 must be at least 0"):
        inspect_reader("train", reader, limit=-1)


@pytest.mark.parametrize(("exif", "size"), [("apply", "832x1248"), ("ignore", "1248x832")])
def test_sizes_follow_the_readers_orientation(exif, size: str, jpeg) -> None:
    reader = Pairs(("a", jpeg(), photograph(6, 832, 1248), 1.0))
    reader.exif = exif
    images = inspect_reader("train", reader).images
    assert images is not None and images.sizes[size] == 1


def test_prompts_that_splits_share_count_as_training_compares_them() -> None:
    assert shared_prompts(["a cat", "A  cat", "b"], ["a cat", "c", "C"]) == [1, 2, 1]
    report = Report("data", shared={"train beside test": [1, 2, 1]}).to_text().splitlines()
    assert report[-1].split() == ["train", "beside", "test", "1", "2", "1"]


def test_edits_are_counted_and_their_pictures_looked_at(jpeg) -> None:
    pictures = [ImageRef("p", jpeg()), ImageRef("odd", b"garbage")]
    images = jpeg((9, 90, 9)), jpeg((90, 9, 9))
    reader = Pairs(*((prompt, *images, 1.0) for prompt in (*(EditPrompt("red", [one]) for one in pictures), "red")))
    counts = inspect_reader("train", reader)
    assert (counts.edits, counts.distinct_prompts) == ({0: 1, 1: 2}, 3)
    assert counts.images is not None and counts.images.unreadable_rows == {"unknown image format": 1}
    assert counts.images.first_unreadable[0].startswith("row 1, pair 1: image 'odd': unknown image format")
    assert "edits of 1                        2 (66.7 %)" in Report("data", splits=[counts]).to_text()
