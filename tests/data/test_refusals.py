"""What is refused, wherever it comes from: one line that names the field or the file at fault."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from latentreward.core.contracts import ImageRef, PreferencePair
from latentreward.core.errors import InputError
from latentreward.data import (
    MPCF,
    DatasetPairReader,
    DiffusionRMReader,
    EditPairReader,
    FolderPairReader,
    GenAIBenchReader,
    HPDv2Reader,
    HPDv3Reader,
    JSONLPairReader,
    PairGaps,
    PairReader,
    PickAPicReader,
    PreferenceDataModule,
    PromptDataModule,
    ScoreTable,
    ScoreTargets,
    select_consistent,
)
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.data.clips import ClipLoader
from latentreward.data.dataset_export import export_split
from latentreward.data.format_detection import recognise
from latentreward.data.image_lists import read_images
from latentreward.data.image_sizes import sort_buckets
from tests.data.conftest import SCHEMA, encode, pickapic_row


class One(PairReader):
    """A reader of one row."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> PreferencePair:
        return PreferencePair("0", "", ImageRef("a"), ImageRef("b"), 1.0)


EDITED = b'{"prompt": "x", "source_images": %s}'
FILES: dict[Callable[[str], Any], list[tuple[str, bytes, str]]] = {
    PromptDataModule: [
        ("empty.txt", b"\n \n", "holds no prompt"),
        ("comments.txt", b"# a\n#\n", "holds no prompt"),
        ("latin.txt", "Fuß".encode("latin-1"), "is not UTF-8 at byte 3"),
        ("key.json", b'[{"prompt_text": "a cat"}]', "row 1 has no column 'prompt' or 'caption' (it has: 'prompt_text'"),
        ("key.jsonl", b'{"prompt": "a cat", "prompt": "a dog"}', "line 1: key 'prompt' is given twice"),
        ("column.csv", b"text,id\na cat,1\n", "row 1 has no column 'prompt'"),
        ("number.json", b'[{"prompt": 3}]', "row 1 holds 3 as prompt, not text"),
        ("broken.json", b"[", "not JSON"),
        ("keys.json", b'{"0": "a cat", "1": "a dog"}', "give a list"),
        ("edit.jsonl", b'{"prompt": "x", "input_image": "a.png"}', "row 1 is an edit of a picture, in 'input_image'"),
        ("gone.jsonl", b'{"prompt": "make it red", "source_image": "a.png"}', "row 1: image 'a.png': missing file"),
        ("text.jsonl", b'{"prompt": "b", "source_image": "text.jsonl"}', "row 1: image 'text.jsonl': unknown image"),
        ("out.jsonl", EDITED % b'["../a.png"]', "path outside the root"),
        ("odd.jsonl", EDITED % b"[3]", "row 1 has 3 in source_images"),
        ("many.jsonl", EDITED % b"[1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8]", "row 1 has 17 pictures"),
        ("lists.jsonl", b'["prompt"]', "row 1 holds ['prompt'], neither"),
        ("edit.csv", b"prompt,src_img\nmake it red,in/a.PNG\n", "row 1 is an edit of a picture, in 'src_img'"),
        ("surrogate.json", b'["\\ud800"]', "surrogates not allowed"),
        ("broken.parquet", b"PAR1", "cannot be read"),
        ("line.jsonl", b'{"prompt": "a cat"}\n\n{bad\n', "line 3: no JSON at character 2"),
        ("comma.csv", b"id,prompt\n1,a cat, a dog\n", "line 2: more fields than the header's 2"),
        ("open.csv", b'prompt\n"a cat\na dog\n', "unexpected end of data"),
        ("twice.csv", b"prompt,prompt\na cat,a dog\n", "two columns have the name 'prompt'"),
        ("prompts.docx", b"", "is none of .txt"),
    ],
    read_images: [
        ("empty.csv", b"", "empty.csv holds no row"),
        ("a.csv", b"url,prompt\nx,y\n", "(it has: 'url, prompt'); name it with --image_column"),
        ("a.csv", b"image,title\nx,y\n", "no column prompt, caption or text"),
        ("a.jsonl", b"no json\n", "line 1: no JSON at character 1"),
        ("a.csv", b"image,prompt\nx,caf\xe9\n", "a.csv is not UTF-8 at byte 19"),
        ("a.parquet", b"PAR1", "a.parquet is a table, not a list or a picture"),
        ("a.json", b'{"0": "a.png"}', "give a list of images"),
        ("a.csv", b"image,prompt\nx,y,z\n", "line 2: more fields"),
    ],
    lambda file: ScoreTable(file).gaps(One()): [
        ("scores.txt", b"", "ends in .csv, .jsonl or .parquet"),
        ("scores.parquet", b"PAR1 not", "not a whole parquet file"),
        ("scores.csv", b"", "not a whole csv file"),
        ("scores.csv", b"pair_id,score\nx,1\n", "no column NAME_gap, nor NAME_a and NAME_b"),
        ("scores.csv", b"a_gap,a_gap\n1,1\n", "column 'a_gap' is there twice"),
        ("scores.csv", b"pair_id,a_gap\nx,1\nx,2\n", "pair_id 'x' is in 2 rows"),
        ("scores.csv", b"different_flag,a_gap\n1,word\n", "column a_gap is string, not numbers"),
        ("scores.csv", b"pair_id,a_gap\ntest:0,1\n", "first is '0', the table's 'test:0'"),
    ],
    lambda file: HPDv3Reader(str(Path(file).parent), "odd"): [
        ("odd.json", b"[" * 200_000, "not JSON"),
        ("odd.json", b"[]", "no rows left"),
        ("other.json", b"[]", "split: no file "),
    ],
    JSONLPairReader: [
        ("a.jsonl", b"\n \n", "has no rows left; check"),
        ("a.jsonl", '{"prompt": "Füße"}'.encode("utf-16"), "a.jsonl is in UTF-16, and JSON lines are UTF-8"),
        ("a.csv", b"prompt,left\na cat,b\n", "(it has prompt, left); name one pair"),
    ],
    lambda file: JSONLPairReader(file, on_error="skip"): [
        ("a.jsonl", b"{\n[", "2 row is no object left out; a.jsonl:1")
    ],
    recognise: [
        ("test-00000-of-00001.parquet", b"PAR1 no more", "test-00000-of-00001.parquet: not a whole parquet file"),
        ("rows.json", b"[1, 2]", "is none of Pick-a-Pic"),
    ],
}


@pytest.mark.parametrize(
    ("read", "name", "content", "key"), [(read, *case) for read, cases in FILES.items() for case in cases]
)
def test_a_file_that_cannot_be_read_is_one_line(
    read: Callable[[str], Any], name: str, content: bytes, key: str, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    refused(lambda: read(str(tmp_path / name)), key)


def refused(call: Callable[[], Any], *keys: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    for key in keys:
        assert key in str(error.value)
    assert "\n" not in str(error.value)


SETTINGS: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (PreferenceDataModule, {"size": 0}, "data.size is 0"),
    (PreferenceDataModule, {"size": 8, "batch_size": 0}, "data.batch_size is 0"),
    (PreferenceDataModule, {"size": 16, "frames": 0}, "data.frames is 0"),
    (PreferenceDataModule, {"size": 16, "frames": 5, "fps": 0.0}, "data.fps=0 must lie in"),
    (ClipLoader, {"height": 16, "width": 16, "frames": 5, "fps": float("nan")}, "fps=nan must lie in"),
    (PromptLoaders, {"prompts": ["a"], "prompts_per_rollout": 0}, "prompts_per_rollout is 0"),
    (MPCF, {"floors": {"pickscore": 0.0}}, "tie_limits lacks 'pickscore'"),
    (ScoreTargets, {"tables": {"train": "x.csv"}, "columns": []}, "columns is empty"),
    (ScoreTargets, {"tables": {}, "columns": ["a"]}, "tables is empty"),
    (
        ScoreTargets,
        {"tables": {"train": "x"}, "columns": ["a"], "uncertainties": ["a", "b"]},
        "name one for each",
    ),
    (ScoreTargets, {"tables": {"val": "x.csv"}, "columns": ["a"]}, "no train"),
    (ScoreTargets, {"tables": {"vla": "x.csv"}, "columns": ["a"]}, "no split 'vla'; did you mean 'val'"),
    (ScoreTable, {"path": "absent.csv"}, "no table of scores"),
    (sort_buckets, {"sizes": []}, "none given"),
    (sort_buckets, {"sizes": [(64, 0)]}, "[64, 0] is not a size"),
    (read_images, {"source": "gone.csv"}, "gone.csv: No such file"),
    (read_images, {"source": "nowhere/**/*.png"}, "images: 'nowhere/**/*.png' is neither a folder"),
    (recognise, {"data": "nowhere"}, "data: no folder or file 'nowhere'; name a data set of the hub"),
    (JSONLPairReader, {"file": "absent.jsonl"}, "absent.jsonl: No such file"),
    (JSONLPairReader, {"file": "a.TSV"}, "split: no file a.TSV"),
    (JSONLPairReader, {"file": "."}, "is a folder"),
    (HPDv2Reader, {"root": ".", "split": "absent"}, "no file absent.json"),
    (PickAPicReader, {"source": "/nowhere/at/all", "split": "train"}, "source: no folder '/nowhere/at/all'"),
    (FolderPairReader, {"root": "."}, "root: no folder chosen"),
    (DiffusionRMReader, {"root": "."}, "index: no bucket_index.csv; correct root"),
    (DiffusionRMReader, {"root": ".", "index": None}, "root: no *.parquet"),
    (DatasetPairReader, {"source": [{"prompt": "x"}]}, "source is a list; give a folder"),
    (
        DatasetPairReader,
        {"source": DatasetDict(val=Dataset.from_dict({}))},
        "no 'train' in the DatasetDict; it has val",
    ),
]


@pytest.mark.parametrize(("make", "settings", "key"), SETTINGS)
def test_a_setting_that_cannot_be_is_one_line(
    make: Callable[..., Any], settings: dict[str, Any], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: make(**settings), key)


def vote_table(**columns: Any) -> pa.Table:
    texts = {name: ["x"] for name in ("prompt", "left_model", "right_model", "vote_type")}
    images = {f"{side}_image": [encode()] for side in ("left", "right")}
    return pa.table({name: values for name, values in {**texts, **images, **columns}.items() if values is not None})


def pickapic_table(**columns: Any) -> pa.Table:
    values = {name: [value] for name, value in pickapic_row(0).items()}
    kinds = dict(zip(SCHEMA.names, SCHEMA.types, strict=True))
    made = {name: pa.array(one, kinds[name]) for name, one in values.items() if name not in columns}
    return pa.table({**made, **{name: one for name, one in columns.items() if one is not None}})


PICKAPIC, VOTES, OWN = PickAPicReader, GenAIBenchReader, DatasetPairReader
PAIR = {"prompt": ["x"], "chosen": [b"a"], "rejected": [b"b"]}
TABLES: list[tuple[Callable[..., Any], pa.Table, dict[str, Any], str]] = [
    *((PICKAPIC, pickapic_table(**{name: None}), {}, f"no column {name};") for name in ("caption", "jpg_1")),
    (PICKAPIC, pickapic_table(label_0=["left"]), {}, "column label_0 is string, not double"),
    (PICKAPIC, pickapic_table(jpg_0=[7]), {}, "column jpg_0 is int64, not images"),
    *((PICKAPIC, pickapic_table(has_label=[odd]), {}, "column has_label is ") for odd in (2, float("nan"))),
    (PICKAPIC, pickapic_table(are_different=[False]), {"drop_identical": True}, "has no rows left"),
    (PICKAPIC, pickapic_table(jpg_0=None, jpg_1=None), {}, "copy without images"),
    (VOTES, vote_table(right_image=None), {}, "no column right_image; give the published files"),
    (VOTES, vote_table(left_image=[1]), {}, "column left_image is int64, not images"),
    (OWN, pa.table(PAIR), {"columns": {"promt": "prompt"}}, "no field 'promt'; did you mean 'prompt'"),
    (OWN, pa.table(PAIR), {"columns": {"prompt": "promt"}}, "columns.prompt: no column 'promt'"),
    (OWN, pa.table({"caption": ["x"], "n": [1]}), {}, "no column prompt (it has caption, n); name it, e.g. columns"),
    (OWN, pa.table({"prompt": ["x"], "n": [1]}), {}, "no columns chosen and rejected"),
    (OWN, pa.table({**PAIR, "chosen": ["a.jpg"]}), {}, "column chosen is string, not images; give bytes or paths"),
    (lambda source, _: recognise(source), pa.table({"x": [1]}), {}, "is a table whose columns no reader knows: x; "),
    (
        lambda source, _, **o: DiffusionRMReader(source, None),
        pa.table({"prompt": ["a"]}),
        {},
        "no column latent1, latent2",
    ),
]


@pytest.mark.parametrize(("make", "table", "options", "key"), TABLES)
def test_a_table_that_does_not_serve_is_one_line(
    make: Callable[..., Any], table: pa.Table, options: dict[str, Any], key: str, tmp_path: Path
) -> None:
    pq.write_table(table, tmp_path / "train.parquet")
    refused(lambda: make(str(tmp_path), "train", **options), key)


def test_what_an_export_cannot_write_is_one_line(tmp_path: Path) -> None:
    reader = One()
    refused(lambda: export_split(reader, tmp_path, "train/aes", {}), "split is 'train/aes'; give a name of letters")
    refused(lambda: export_split(reader, tmp_path, "train", {}, 0), "rows_per_file is 0")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").touch()
    refused(lambda: export_split(reader, tmp_path, "train", {}), "holds files of train that no export wrote")
    reader.holds = "latents"
    refused(lambda: export_split(reader, tmp_path, "train", {}), "holds latents; only images")


def test_a_scorer_that_a_table_lacks_is_named() -> None:
    rows = PairGaps(np.array([True]), dict.fromkeys(("aesthetic", "clipscore", "vqa_score"), np.ones(1)))
    refused(lambda: select_consistent(rows, MPCF()), "no 'vqascore'; did you mean 'vqa_score'")


def test_a_split_that_is_not_set_is_named() -> None:
    data = PreferenceDataModule(8)
    assert data.val_dataloader() == []
    for stage in ("train", "test", "predict"):
        refused(getattr(data, f"{stage}_dataloader"), f"data.{stage} is not set", f"--data.{stage} JSONLPairReader")


def test_what_is_no_set_of_edits_is_one_line(tmp_path: Path) -> None:
    row = {"prompt": "x", "path_src": "s.jpg", "path1": "a.jpg", "path2": "b.jpg"}
    (tmp_path / "train.json").write_text(json.dumps([row]))
    file = str(tmp_path / "train.json")
    for layout, key in ("mmrb", "did you mean 'mmrb2'"), ("mmrb2", "has not the fields of mmrb2 (it has path1, "):
        refused(lambda layout=layout: EditPairReader(file, layout=layout), key)
    refused(lambda: EditPairReader(file, axis="visual_quality"), "axis: ", "has no scores of visual_quality")
    assert len(EditPairReader(file, "test")) == 1  # a file is its own split
