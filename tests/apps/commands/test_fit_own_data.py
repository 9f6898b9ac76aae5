"""The trainer's subcommands on pairs of one's own: shipped files, splits that are used, bad rows, shared prompts."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from latentreward.apps.cli import main

ROOT = Path(__file__).resolve().parents[3]
SMALL = ["--data.size=32", "--data.num_workers=0", "--data.batch_size=2", "--trainer.limit_val_batches=1"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAIRS_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, red in (("a", 200), ("b", 30)):
        Image.new("RGB", (48, 40), (red, 20, 20)).save(tmp_path / f"{name}.jpg")
    write(tmp_path / "train.jsonl", "one", "two", "three", "four")
    write(tmp_path / "val.jsonl", "five", "six")
    return tmp_path


def write(file: Path, *prompts: str, more: str = "") -> None:
    rows = [{"prompt": prompt, "chosen": "a.jpg", "rejected": "b.jpg"} for prompt in prompts]
    file.write_text("\n".join(map(json.dumps, rows)) + f"\n{more}\n")


def run(command: str, *settings: str, data: str = "jsonl") -> None:
    files = [f"--config={ROOT}/configs/{name}.yaml" for name in ("model/lrm_tiny", f"data/{data}", "trainer/cpu")]
    steps = ["--trainer.max_steps=1"] if command == "fit" else []
    main([command, *files, *SMALL, *steps, *settings])


def refusal(capsys: pytest.CaptureFixture[str], command: str, *settings: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        run(command, *settings)
    return capsys.readouterr().err.splitlines()[-1].removeprefix("latentreward: error: ")


@pytest.mark.slow
def test_json_lines(root, caplog) -> None:
    write(root / "val.jsonl", "ONE", "five", "six")
    run("fit")
    (config,) = root.rglob("config.yaml")
    readers = yaml.safe_load(config.read_text())["data"]["init_args"]
    assert readers["train"]["init_args"]["on_error"] is None
    assert readers["predict"]["class_path"].endswith("JSONLPairReader")
    assert (
        "data.train: 1 of 4 rows have a prompt that val has too; left out, 3 labelled rows remain; to keep"
        in caplog.text
    )
    caplog.clear()
    run("fit", "--data.shared_prompts=keep", "--trainer.fast_dev_run=true")
    assert "left out" not in caplog.text


@pytest.mark.slow
def test_only_the_readers_of_the_command_are_opened(root, caplog, capsys) -> None:
    test = ["--data.test=JSONLPairReader", "--data.test.file=test.jsonl"]
    run("fit", "--data.predict.file=absent.jsonl", *test, "--trainer.fast_dev_run=true")
    assert "data.test is not opened (test.jsonl: No such file" in caplog.text
    write(root / "test.jsonl", "one", "five", "six")
    caplog.clear()
    run("test", *test, "--data.train.file=absent.jsonl", "--data.val.file=absent.jsonl")
    run("predict", "--data.train.file=absent.jsonl", "--data.test=JSONLPairReader", "--data.test.file=absent.jsonl")
    assert "absent.jsonl" not in caplog.text
    line = refusal(capsys, "fit", *test)
    assert line.startswith("data.val: none of 2 rows left: 2 have a prompt that test has too; set data.shared_prompts")
    assert "set data.shared_prompts: keep" in line
    line = refusal(capsys, "test")
    assert line.startswith("data.test is not set; give it a reader")
    assert line.endswith("e.g. --data.test JSONLPairReader --data.test.file FILE")
    assert refusal(capsys, "fit", "--data.val.file=absent.jsonl").startswith("data.val: absent.jsonl: No such file")


@pytest.mark.slow
def test_on_error_of_the_data_holds_for_readers_without_their_own(root, caplog, capsys) -> None:
    write(root / "train.jsonl", "one", "two", "three", "four", more="no object")
    write(root / "val.jsonl", "five", "six", more="no object")
    line = refusal(capsys, "fit")
    assert line.startswith("data.train: train.jsonl:5: no JSON at character 1; correct the row")
    assert "set data.on_error (or the reader's own, which wins) to skip" in line
    assert refusal(capsys, "fit", "--data.train.on_error=skip").startswith("data.val: val.jsonl:3")
    assert refusal(capsys, "fit", "--data.on_error=skip", "--data.val.on_error=raise").startswith("data.val: ")
    write(root / "test.jsonl", "one", more="no object")
    caplog.clear()
    test = ["--data.test=JSONLPairReader", "--data.test.file=test.jsonl"]
    run("fit", "--data.val=null", "--data.train.on_error=skip", *test, "--trainer.fast_dev_run=true")
    assert "data.train: 1 of 4 rows have a prompt that test has too" in caplog.text
