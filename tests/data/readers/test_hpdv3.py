import json
from pathlib import Path

import pytest

from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError
from latentreward.data import HPDv3Reader, PairDataset, PixelLoader
from latentreward.data.format_detection import recognise


def test_row_becomes_a_record(write_hpdv3, hpdv3_rows) -> None:
    root = write_hpdv3([hpdv3_rows(0), hpdv3_rows(1, prompt="two\n\nparagraphs")])
    pair = HPDv3Reader(root, "train", randomise_sides=False)[1]
    assert (pair.pair_id, pair.prompt, pair.label_a) == ("train.json:1", "two\n\nparagraphs", 1.0)
    assert (pair.image_a.image_key, pair.image_a.path) == ("images/1-good.jpg", Path(root, "images/1-good.jpg"))
    assert (pair.votes, pair.confidence, pair.model_a, pair.model_b) == ((9, 3), 0.97, "flux", "sdxl")
    assert (pair.source, pair.split, pair.weight) == ("hpdv3", "train", 1.0)


@pytest.mark.parametrize(
    ("changes", "votes", "confidence", "remarks"),
    [
        ({"choice_dist": None, "confidence": None}, None, None, []),
        ({"choice_dist": ..., "confidence": ..., "model1": ..., "model2": ...}, None, None, []),
        ({"choice_dist": "[8, 1]", "confidence": "0.98"}, (8, 1), 0.98, []),
        ({"choice_dist": "null", "confidence": "null"}, None, None, []),
        ({"choice_dist": [3, 9]}, (3, 9), 0.97, []),
        ({"choice_dist": [0, 0]}, (0, 0), 0.97, []),
        ({"choice_dist": [5, 5.0]}, (5, 5), 0.97, []),
        ({"choice_dist": [7]}, None, 0.97, ["votes not readable"]),
        ({"choice_dist": [-1, 2]}, None, 0.97, ["votes not readable"]),
        ({"choice_dist": "__import__('os')"}, None, 0.97, ["votes not readable"]),
        ({"choice_dist": {"a": 1}}, None, 0.97, ["votes not readable"]),
        ({"confidence": "high"}, (9, 3), None, ["confidence not readable"]),
        ({"confidence": float("nan")}, (9, 3), None, ["confidence not readable"]),
        ({"confidence": True}, (9, 3), None, ["confidence not readable"]),
    ],
)
def test_votes_and_confidence(write_hpdv3, hpdv3_rows, changes, votes, confidence, remarks) -> None:
    reader = HPDv3Reader(write_hpdv3([hpdv3_rows(0, **changes)]), "train", randomise_sides=False)
    assert (reader[0].votes, reader[0].confidence, reader[0].label_a) == (votes, confidence, 1.0)
    assert list(reader.remarks) == remarks


@pytest.mark.parametrize(
    ("votes", "label"), [([9, 3], 0.75), ([3, 9], 0.25), ([4, 4], 0.5), ([0, 0], 1.0), (None, 1.0), ([0, 7], 0.0)]
)
def test_labels_from_votes(write_hpdv3, hpdv3_rows, votes, label) -> None:
    root = write_hpdv3([hpdv3_rows(0, choice_dist=votes)])
    assert HPDv3Reader(root, "train", label="votes", randomise_sides=False)[0].label_a == label
    assert HPDv3Reader(root, "train", randomise_sides=False)[0].label_a == 1.0


def test_confidence_threshold_keeps_what_has_none(write_hpdv3, hpdv3_rows) -> None:
    values = [0.95, 0.9499, None, ..., "null", "0.98", "0.2", 1, 0]
    root = write_hpdv3([hpdv3_rows(n, confidence=value) for n, value in enumerate(values)])
    reader = HPDv3Reader(root, "train", min_confidence=0.95)
    assert [reader[i].pair_id.split(":")[1] for i in range(len(reader))] == ["0", "2", "3", "4", "5", "7"]
    assert dict(reader.skipped) == {"confidence below the threshold": 3}


def test_keys_do_not_depend_on_spelling(write_hpdv3, hpdv3_rows) -> None:
    rows = [hpdv3_rows(0), hpdv3_rows(0, path1="./images/0-good.jpg", path2="images//0-bad.jpg")]
    reader = HPDv3Reader(write_hpdv3(rows), "train", randomise_sides=False)
    assert reader[0].image_a.image_key == reader[1].image_a.image_key
    assert reader[0].image_b.image_key == reader[1].image_b.image_key


def test_absolute_paths_inside_the_root_are_inside(write_hpdv3, hpdv3_rows, tmp_path, monkeypatch) -> None:
    root = Path(write_hpdv3([hpdv3_rows(0)]))
    (tmp_path / "link").symlink_to(root)
    places = [root, tmp_path / "link", root / "images" / ".."]
    written = [{f"path{n}": str(place / hpdv3_rows(0)[f"path{n}"]) for n in (1, 2)} for place in places]
    write_hpdv3([hpdv3_rows(0), *(hpdv3_rows(n, **paths) for n, paths in enumerate(written))])
    monkeypatch.chdir(tmp_path)
    for folder in (str(root), "hpdv3", "link", str(tmp_path / "link")):
        reader = HPDv3Reader(folder, "train", randomise_sides=False)
        assert {reader[n].image_a.image_key for n in range(4)} == {"images/0-good.jpg"}
        dataset = PairDataset(reader, PixelLoader(8, 8))
        assert all(bool((dataset[n].pixels_b == dataset[0].pixels_b).all()) for n in range(4))
    beside = str(root) + "-other/images/0-good.jpg"
    write_hpdv3([hpdv3_rows(0, path1=beside)])
    with pytest.raises(InputError, match=r"path1 .* leads out of hpdv3"):
        HPDv3Reader("hpdv3", "train")


def test_hpdv3_plus_is_read_by_the_subfolder_of_its_file(hpdv3_rows, write_hpdv3) -> None:
    """Layout and fields of its card: pairs of three fields, and pairs with votes and confidence as texts."""
    plain = dict.fromkeys(("choice_dist", "confidence", "model1", "model2"), ...)
    root = Path(write_hpdv3([]))
    for split, row in {"train/train_aes": hpdv3_rows(0, **plain), "test/test_tf": hpdv3_rows(1, **plain)}.items():
        (root / split).parent.mkdir()
        (root / f"{split}.json").write_text(json.dumps([row]))
    labelled = hpdv3_rows(2, choice_dist="[8, 1]", confidence="0.98", model1=None, model2=None)
    (root / "train/stage1_labeled.json").write_text(json.dumps([labelled]))
    (root / "train/rollout.json").write_text(json.dumps([{"group_id": "cap_0_sd15_0", "image_path": "images/a.jpg"}]))
    (root / "train.json").unlink()
    found = recognise(str(root))
    assert set(found) == {"stage1_labeled", "train_aes", "test_tf"}
    readers = {name: build(randomise_sides=False) for name, build in found.items()}
    assert readers["test_tf"][0].pair_id == "test_tf.json:0"
    assert readers["train_aes"][0].image_a.path == root / "images/0-good.jpg"
    assert (readers["stage1_labeled"][0].votes, readers["stage1_labeled"][0].confidence) == ((8, 1), 0.98)


def test_nothing_to_read_is_one_clear_line(write_hpdv3, hpdv3_rows, tmp_path) -> None:
    root = write_hpdv3([hpdv3_rows(0)])
    with pytest.raises(InputError, match=r"split: no file .*test\.json; correct"):
        HPDv3Reader(root, "test")
    for content, message in [
        ("{}", "holds {}; give"),
        ("[1,", "not JSON"),
        ("[" * 200_000, "not JSON"),
        ("[]", "no rows left"),
    ]:
        Path(root, "odd.json").write_text(content)
        with pytest.raises(InputError, match=message) as error:
            HPDv3Reader(root, "odd")
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"no rows left; 1 .* left out; check the file and min_confidence"):
        HPDv3Reader(root, "train", min_confidence=0.99)


@pytest.mark.parametrize("label", ["hard", "votes"])
def test_labels_and_facts_need_no_rows(write_hpdv3, hpdv3_rows, monkeypatch, label) -> None:
    votes = [[9, 3], [0, 0], None, [1, 4]]
    root = write_hpdv3([hpdv3_rows(n, choice_dist=value) for n, value in enumerate(votes)], images=False)
    reader = HPDv3Reader(root, "train", label=label)
    pairs = [reader[n] for n in range(4)]
    monkeypatch.setattr(HPDv3Reader, "read_row", None)
    assert reader.labels().tolist() == [pair.label_a for pair in pairs]
    assert reader.facts()["votes_a"] == [pair.votes and pair.votes[0] for pair in pairs]


def test_an_edit_is_refused_by_the_field_of_its_picture(write_hpdv3, hpdv3_rows) -> None:
    root = write_hpdv3([hpdv3_rows(0, path_src="images/0-good.jpg")])
    with pytest.raises(InputError, match=r"train\.json:0: 'path_src' is a picture to edit, and source_images is read"):
        HPDv3Reader(root, "train")
    assert HPDv3Reader(root, "train", sources="ignore").prompts() == ["prompt 0"]
    renamed = HPDv3Reader(write_hpdv3([hpdv3_rows(0, source_images=["images/0-good.jpg"])]), "train")
    assert [source.image_key for source in sources_of(renamed[0].prompt)] == ["images/0-good.jpg"]
