"""Pick-a-Pic tars: samples at their offsets, labels as text, archives that end early."""

import pickle
import tarfile
from pathlib import Path

import pytest

from latentreward.core.errors import InputError
from latentreward.data import PairDataset, PickAPicTarReader, PixelLoader, SkippedPair
from tests.data.conftest import write_tar


@pytest.fixture
def sample(jpeg):
    """Members of a sample; ``...`` as content leaves one out."""

    def make(number: int, **changes):
        members = {
            "jpg_0.jpg": jpeg((10 * number % 256, 40, 80)),
            "jpg_1.jpg": jpeg((200, 10 * number % 256, 80)),
            "label_0.txt": f"{number % 2:.1f}",
            "label_1.txt": f"{1 - number % 2:.1f}",
            "original_prompt.txt": f"prompt {number}",
        }
        members |= {name.replace("__", "."): content for name, content in changes.items()}
        return {name: content for name, content in members.items() if content is not ...}

    return make


@pytest.fixture(name="write_tar")
def write_samples(tmp_path: Path):
    def write(name: str, *samples, folder: str = "", fmt: int = tarfile.GNU_FORMAT) -> Path:
        members = {
            f"{folder}{number:08d}.{suffix}": content.encode() if isinstance(content, str) else content
            for number, sample in enumerate(samples)
            for suffix, content in sample.items()
        }
        return write_tar(tmp_path / "tars" / name, members, fmt)

    return write


def test_samples_of_all_tars_become_rows(write_tar, sample) -> None:
    root = write_tar("00000.tar", sample(0), sample(1, original_prompt__txt=" raw\n\n🦊 نص ")).parent
    write_tar(
        "00001.tar", sample(2, label_0__txt="0.5", label_1__txt="0.5\n"), folder="./inner/", fmt=tarfile.PAX_FORMAT
    )
    reader = PickAPicTarReader(str(root))
    assert reader.pair_ids() == ["00000.tar:00000000", "00000.tar:00000001", "00001.tar:inner/00000000"]
    assert reader.prompts() == ["prompt 0", " raw\n\n🦊 نص ", "prompt 2"]
    assert reader.labels().tolist() == [0.0, 1.0, 0.5]
    pair = reader[2]
    assert (pair.image_a.data, pair.image_b.data) == (sample(2)["jpg_0.jpg"], sample(2)["jpg_1.jpg"])
    assert (pair.label_a, pair.weight, pair.source, pair.split) == (0.5, 1.0, "pickapic", "train")
    assert [reader[n].pair_id for n in range(3)] == reader.pair_ids()
    assert not reader.skipped
    assert not reader.remarks


def test_rows_pickle_and_equal_bytes_have_one_key(write_tar, sample, jpeg) -> None:
    path = write_tar(
        "00000.tar", sample(0), sample(0), sample(1, jpg_1__jpg=jpeg((10, 40, 80)), jpg_0__jpg=jpeg((10, 40, 80)))
    )
    reader = pickle.loads(pickle.dumps(PickAPicTarReader(str(path))))
    assert reader[0].image_a == reader[1].image_a
    assert reader[2].image_a.image_key == reader[2].image_b.image_key
    assert (reader[0].weight, reader[2].weight) == (0.5, 1.0)  # two rows with one prompt
    assert PickAPicTarReader(str(path), weight="equal")[0].weight == 1.0
    different = PickAPicTarReader(str(path), drop_identical=True)
    assert (len(different), dict(different.skipped)) == (2, {"identical images": 1})
    unlike = write_tar("unlike.tar", sample(0, jpg_0__jpg=b"one picture", jpg_1__jpg=b"the other 1"))
    assert not PickAPicTarReader(str(unlike), drop_identical=True).skipped  # of equal length, but other bytes


def test_absent_members(write_tar, sample) -> None:
    path = write_tar("00000.tar", sample(0, jpg_1__jpg=...), sample(1, original_prompt__txt=..., other__json="{}"))
    reader = PickAPicTarReader(str(path), on_error="skip")
    assert reader.prompts() == ["prompt 0", ""]
    assert dict(reader.remarks) == {"null prompt read as empty": 1}
    dataset = PairDataset(reader, PixelLoader(8, 8))
    assert isinstance(dataset[0], SkippedPair)
    assert dict(dataset.skipped()) == {"no image": 1}


@pytest.mark.parametrize("cut", ["inside an image", "at a member", "inside a header", "before the zeros"])
def test_tar_that_ends_early_follows_on_error(write_tar, sample, cut) -> None:
    path = write_tar("00000.tar", sample(0), sample(1), sample(2))
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-4]  # second image of the last sample
        end = archive.getmembers()[-1]
    size = {
        "inside an image": last.offset_data + 100,
        "at a member": last.offset,
        "inside a header": last.offset + 77,
        "before the zeros": end.offset_data + 512,
    }[cut]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"00000.tar: the tar ends early .*; download it again; "):
        PickAPicTarReader(str(path))
    for on_error in ("skip", "placeholder"):
        reader = PickAPicTarReader(str(path), on_error=on_error)
        assert reader.prompts() == [f"prompt {n}" for n in range(3 if cut == "before the zeros" else 2)]
        assert (reader.skipped + reader.remarks).total() == 1
        assert all(reader[n].image_b.data for n in range(len(reader)))


def test_not_a_tar(write_tar, sample, tmp_path) -> None:
    root = write_tar("00000.tar", sample(0)).parent
    (root / "00001.tar").write_bytes(b"garbage" * 999)
    (root / "00002.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"00001.tar: not an uncompressed tar"):
        PickAPicTarReader(str(root))
    reader = PickAPicTarReader(str(root), on_error="skip")
    assert (len(reader), dict(reader.skipped)) == (1, {"tar not readable to its end": 2})
    with pytest.raises(InputError, match=r"root: no \*.tar in .*; set it to"):
        PickAPicTarReader(str(tmp_path))
    with pytest.raises(InputError, match=r"root: no samples with jpg_0.jpg"):
        PickAPicTarReader(str(write_tar("only.tar", {"other.txt": "x"})))
