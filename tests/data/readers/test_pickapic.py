import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentreward.core.errors import InputError
from latentreward.data import PairDataset, PickAPicReader, PixelLoader

NAME = "train-00000-of-00001-0123456789abcdef.parquet"


def test_row_becomes_a_record(write_pickapic, pickapic_rows) -> None:
    source = write_pickapic([pickapic_rows(0), pickapic_rows(1, num_example_per_prompt=4, caption=" raw\n\n🦊 نص ")])
    pair = PickAPicReader(source, "train")[1]
    assert pair.pair_id == f"{NAME}:1"
    assert pair.prompt == " raw\n\n🦊 نص "
    assert (pair.label_a, pair.weight) == (1.0, 0.25)
    assert (pair.image_a.image_key, pair.image_b.image_key) == ("image-1-0", "image-1-1")
    assert pair.image_a.data == pickapic_rows(1)["jpg_0"]
    assert (pair.model_a, pair.model_b, pair.source, pair.split) == ("left", "right", "pickapic", "train")


@pytest.mark.parametrize(
    ("changes", "label", "remark"),
    [
        ({"label_0": 1.0, "label_1": 0.0}, 1.0, None),
        ({"label_0": 0.0, "label_1": 1.0}, 0.0, None),
        ({"label_0": 0.5, "label_1": 0.5}, 0.5, None),
        ({"label_0": 0.3, "label_1": 0.7}, 0.3, None),
        ({"label_0": 1.0, "label_1": 1.0}, None, "unlabelled (labels do not add up to 1)"),
        ({"label_0": 0.0, "label_1": 0.0}, None, "unlabelled (labels do not add up to 1)"),
        ({"label_0": None, "label_1": None}, None, "unlabelled (null label)"),
        ({"label_0": None, "label_1": 0.0}, None, "unlabelled (null label)"),
        ({"has_label": False}, None, "unlabelled (has_label is not true)"),
        ({"has_label": None}, None, "unlabelled (has_label is not true)"),
        ({"has_label": False, "label_0": float("nan")}, None, "unlabelled (has_label is not true)"),
    ],
)
def test_labels(write_pickapic, pickapic_rows, changes, label, remark) -> None:
    reader = PickAPicReader(write_pickapic([pickapic_rows(0), pickapic_rows(1, **changes)]), "train")
    assert reader[1].label_a == label
    assert reader.labelled().tolist() == [True, label is not None]
    assert dict(reader.remarks) == ({remark: 1} if remark else {})
    assert not reader.skipped


def test_identical_images_are_dropped_on_demand(write_pickapic, pickapic_rows) -> None:
    rows = [
        pickapic_rows(0),
        pickapic_rows(1, are_different=False),
        pickapic_rows(2, image_0_uid="same", image_1_uid="same"),
        pickapic_rows(3, are_different=None),
    ]
    source = write_pickapic(rows)
    assert len(PickAPicReader(source, "train")) == 4
    reader = PickAPicReader(source, "train", drop_identical=True)
    assert [reader[i].pair_id[-1] for i in range(len(reader))] == ["0", "3"]
    assert dict(reader.skipped) == {"identical images": 2}


def test_odd_values_are_survived(write_pickapic, pickapic_rows) -> None:
    rows = [
        pickapic_rows(0, caption=None, num_example_per_prompt=None),
        pickapic_rows(1, caption="", num_example_per_prompt=0),
        pickapic_rows(2, image_0_uid=None, jpg_1=None),
        pickapic_rows(2),
        pickapic_rows(2),
    ]
    reader = PickAPicReader(write_pickapic(rows), "train")
    assert reader.prompts() == ["", "", "prompt 2", "prompt 2", "prompt 2"]
    assert reader.remarks["null prompt read as empty"] == 1
    assert (reader[0].prompt, reader[0].weight, reader[1].weight) == ("", 1.0, 1.0)
    assert len(reader[2].image_a.image_key) == 32
    assert reader[2].image_b.data is None
    assert reader[3].pair_id != reader[4].pair_id


@pytest.mark.parametrize("column", ["caption", "label_0", "image_1_uid", "jpg_1", "num_example_per_prompt"])
def test_missing_column_is_named(write_pickapic, pickapic_rows, column) -> None:
    with pytest.raises(InputError, match=f"no column {column};"):
        PickAPicReader(write_pickapic([pickapic_rows(0)], drop=[column]), "train")


@pytest.mark.parametrize("values", [[2], [-1], [float("nan")], ["N/A"]])
def test_what_is_no_truth_value_is_not_true(write_pickapic, pickapic_rows, values) -> None:
    path = Path(write_pickapic([pickapic_rows(0)])) / "data" / NAME
    table = pq.read_table(path)
    place = table.column_names.index("has_label")
    pq.write_table(table.set_column(place, "has_label", pa.array([1])), path)
    assert PickAPicReader(str(path.parent), "train").labelled().all()
    pq.write_table(table.set_column(place, "has_label", pa.array(values)), path)
    with pytest.raises(InputError, match=r"column has_label is .*, not bool"):
        PickAPicReader(str(path.parent), "train")


def test_wrong_column_types_are_named(write_pickapic, pickapic_rows) -> None:
    path = Path(write_pickapic([pickapic_rows(0)])) / "data" / NAME
    table = pq.read_table(path)
    labels = table.set_column(table.column_names.index("label_0"), "label_0", pa.array(["left"]))
    pq.write_table(labels, path)
    with pytest.raises(InputError, match="column label_0 is string, not double"):
        PickAPicReader(str(path.parent), "train")
    images = table.set_column(table.column_names.index("jpg_0"), "jpg_0", pa.array([7]))
    pq.write_table(images, path)
    with pytest.raises(InputError, match="column jpg_0 is int64, not images"):
        PickAPicReader(str(path.parent), "train")


def test_nothing_to_read_is_one_clear_line(write_pickapic, pickapic_rows, tmp_path, monkeypatch) -> None:
    source = write_pickapic([pickapic_rows(0)])
    with pytest.raises(InputError, match=r"split: no test-\*\.parquet"):
        PickAPicReader(source, "test")
    with pytest.raises(InputError, match="source: no folder '/nowhere/at/all'"):
        PickAPicReader("/nowhere/at/all", "train")
    with pytest.raises(InputError, match="has no rows left"):
        PickAPicReader(write_pickapic([], split="validation"), "validation")
    with pytest.raises(InputError, match="has no rows left"):
        PickAPicReader(write_pickapic([pickapic_rows(0, are_different=False)]), "train", drop_identical=True)
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(InputError, match="not a whole parquet file"):
        PickAPicReader(str(tmp_path), "train")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="source: no folder 'no/such-set', and the hub does not give it") as error:
        PickAPicReader("no/such-set", "train")
    assert "\n" not in str(error.value)


def test_hub_id_reads_the_files_that_the_builder_lists(write_pickapic, pickapic_rows, monkeypatch, tmp_path) -> None:
    import datasets

    source = write_pickapic([pickapic_rows(n) for n in range(4)], parts=2)
    real = datasets.load_dataset_builder
    asked = []

    def from_folder(path: str, name: str | None, revision: str | None) -> object:
        asked.append((path, name, revision))
        return real(source, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", from_folder)
    reader = PickAPicReader("some/hub-id", "train", revision="abc")
    assert asked == [("some/hub-id", None, "abc")]
    assert [reader[i].pair_id for i in (0, 3)] == [
        f"train-0000{n}-of-00002-0123456789abcdef.parquet:{n}" for n in (0, 1)
    ]
    with pytest.raises(InputError, match="no parquet files of 'test' in 'some/hub-id'; it has train"):
        PickAPicReader("some/hub-id", "test")


def test_missing_part_follows_on_error(write_pickapic, pickapic_rows) -> None:
    source = write_pickapic([pickapic_rows(n) for n in range(6)], parts=3)
    next(Path(source, "data").glob("train-00001-*")).unlink()
    with pytest.raises(InputError, match=r"lacks 1 of its parquet parts \(00001-of-00003\)"):
        PickAPicReader(source, "train")
    reader = PickAPicReader(source, "train", on_error="skip")
    assert len(reader) == 4
    assert reader.skipped["parquet part missing"] == 1


def test_a_split_is_not_mistaken_for_a_longer_name(write_pickapic, pickapic_rows) -> None:
    write_pickapic([pickapic_rows(0), pickapic_rows(1)], split="validation_unique")
    source = write_pickapic([pickapic_rows(2)], split="validation")
    assert len(PickAPicReader(source, "validation")) == 1


@pytest.mark.parametrize("memory_map", [False, True])
def test_random_access_over_parts_gives_the_row_asked_for(
    write_pickapic, pickapic_rows, memory_map, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [pickapic_rows(n) for n in range(23)]
    reader = PickAPicReader(write_pickapic(rows, parts=4, row_group_size=3), "train", memory_map=memory_map)
    for copy in (reader, pickle.loads(pickle.dumps(reader))):
        for n in (22, 0, 6, 5, 17, 11, 12):
            pair = copy[n]
            assert pair.image_a.image_key == f"image-{n}-0"
            assert (pair.image_a.data, pair.image_b.data) == (rows[n]["jpg_0"], rows[n]["jpg_1"])
    assert len({reader[n].pair_id for n in range(23)}) == 23


def test_random_access_reads_single_row_groups(write_pickapic, pickapic_rows) -> None:
    reader = PickAPicReader(write_pickapic([pickapic_rows(n % 20) for n in range(400)], row_group_size=4), "train")
    store = reader.images_in[0]._groups
    assert store.row_groups_read == 0, "construction touches no image"
    reader.prompts(), reader.labelled()
    assert store.row_groups_read == 0
    for row in (399, 7, 200):
        reader[row]
    assert store.row_groups_read == 3
    for row in range(40, 80):
        reader[row]
    assert store.row_groups_read == 3 + 10, "neighbours share a row group"


def test_damaged_row_group_names_the_file(write_pickapic, pickapic_rows) -> None:
    source = write_pickapic([pickapic_rows(n) for n in range(4)])
    reader = PickAPicReader(source, "train")
    path = Path(source, "data", NAME)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=f"{NAME}: not a whole parquet file"):
        reader[3]


def test_large_row_groups_are_pointed_out(write_pickapic, pickapic_rows, monkeypatch, caplog) -> None:
    monkeypatch.setattr("latentreward.data.readers.tables.LARGE_ROW_GROUP", 100)
    PickAPicReader(write_pickapic([pickapic_rows(0)]), "train")
    assert "set memory_map to true" in caplog.text


def test_copy_without_images_is_read_on_demand(write_pickapic, pickapic_rows) -> None:
    rows = [pickapic_rows(0), pickapic_rows(1, image_0_uid=None)]
    source = write_pickapic(rows, drop=("jpg_0", "jpg_1"))
    with pytest.raises(InputError, match=r"copy without images.*set images to none"):
        PickAPicReader(source, "train")
    reader = PickAPicReader(source, "train", images="none")
    assert reader.prompts() == ["prompt 0", "prompt 1"]
    assert reader.labels().tolist() == [0.0, 1.0]
    assert (reader[0].image_a.image_key, reader[1].image_a.image_key) == ("image-0-0", "")
    assert (reader[0].image_a.data, reader[0].image_a.path) == (None, None)
    with pytest.raises(InputError, match="PickAPicReader: its rows hold nothing, not images; give a copy"):
        PairDataset(reader, PixelLoader(8, 8))
