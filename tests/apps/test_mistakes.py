"""Typical mistakes of a newcomer with files and names: each answer is one line that says what to change."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentreward.apps.cli import main
from tests.core.settings.test_refusals import refusal
from tests.marks import rotated_after

HEAD = "prompt,image_a,image_b,label\n"
OPTIONS = ("data=PreferenceDataModule", "data.size=32", "data.num_workers=0", "trainer.accelerator=cpu")
FIT = ["fit", "--config=configs/model/lrm_tiny.yaml", *(f"--{option}" for option in OPTIONS)]
NO_WEIGHTS = "--model=runs/first"
CAPTION = "--prompt=a cat"


def table(file: str) -> list[str]:
    return [*FIT, "--data.train=JSONLPairReader", f"--data.train.file={file}"]


def folder(root: str) -> list[str]:
    return [*FIT, "--data.train=FolderPairReader", f"--data.train.root={root}"]


@pytest.fixture(scope="module")
def _files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, tables and others that are a little wrong."""
    root = tmp_path_factory.mktemp("mistakes")
    for number in range(20):
        for side, seed in (("chosen", 2 * number), ("rejected", 2 * number + 1)):
            pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            for place in (root / "pairs" / side, root / "captioned" / side):
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(place / f"{number}.png")
            (root / "captioned" / side / f"{number}.txt").write_text(f"a cat {number}")
    for name in ("empty", "one", "heic", "half", "full"):
        (root / name).mkdir()
    Image.new("RGB", (32, 32)).save(root / "one" / "1.png")
    (root / "heic" / "1.heic").write_bytes(b"x")
    (root / "half" / "chosen").mkdir()
    Image.new("RGB", (32, 32)).save(root / "half" / "chosen" / "1.png")
    (root / "full" / "letter.txt").write_text("x")
    with zipfile.ZipFile(root / "pairs.zip", "w") as archive:
        archive.write(root / "one" / "1.png", "1.png")
    row = "a cat {0},pairs/chosen/{0}.png,pairs/rejected/{0}.png,{1}\n"
    (root / "numbers.csv").write_text(HEAD + "".join(row.format(number, number % 2) for number in range(4)))
    (root / "words.csv").write_text(HEAD + row.format(0, "left"))
    (root / "gone.csv").write_text(HEAD + row.format(99, "a"))
    (root / "columns.csv").write_text("text,left,right,winner\n" + row.format(0, "left"))
    (root / "no_prompt.csv").write_text("image_a,image_b,label\npairs/chosen/0.png,pairs/rejected/0.png,a\n")
    (root / "list.csv").write_text("photo,text\none/1.png,a cat\n")
    (root / "lora.safetensors").write_bytes(b"xx")
    (root / "none.txt").write_text("")
    (root / "prompts.txt").write_text("a cat\n")
    return root


@pytest.fixture(autouse=True)
def _in_folder(_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_files)
    for name in ("LATENTREWARD_DEBUG", "PROMPTS"):
        monkeypatch.delenv(name, raising=False)


MISTAKES = [
    (["taste", "pictuers"], "pictuers is not a folder; give the folder of your pictures"),
    (["taste", "empty", "--rate"], "has no different pictures; give at least 2"),
    (["taste", "one", "--rate"], "has 1 different picture; give at least 2"),
    (["taste", "heic", "--rate"], "1 .heic file"),
    (["taste", "half"], "sort pictures into these two, or rate two or more with"),
    (["taste", "pairs.zip"], "pairs.zip is not a folder; give the folder"),
    (["taste", "pairs", "--epoch=3"], "did you mean 'epochs'?"),
    (table("pairs.csv"), "no file pairs.csv; correct the path"),
    (table("numbers.csv"), "say which by labels, e.g. labels: {1: a, 0: b}"),
    (table("words.csv"), "say what it means, e.g. labels: {left: a, right: b}"),
    (table("gone.csv"), "first pairs/chosen/99.png of gone.csv:2; see that they are there"),
    (table("columns.csv"), "(it has text, left, right, winner); name it, e.g. columns: {prompt: caption}"),
    (table("no_prompt.csv"), "no column prompt (it has image_a, image_b, label); name it"),
    (table("pairs.zip"), "a zip archive, not a text (unpack it)"),
    (table("https://example.com/pairs.csv"), "no file https:/example.com/pairs.csv; correct the path"),
    (folder("pairs"), "no caption in captions.jsonl, captions/0.txt or chosen/0.txt"),
    (folder("half"), "no folder half/rejected; put images of pairs there"),
    ([*folder("captioned"), "--data.val_share=30"], "give a share between 0 and 1"),
    ([*folder("captioned"), "--trainer.max_step=3"], "did you mean 'trainer.max_steps'?"),
    ([*folder("captioned"), "--model.backbone=sd16"], "model.backbone: unknown name 'sd16'; did you mean 'sd15'?"),
    ([*folder("captioned"), "--ckpt_path=lora.safetensors"], "give a checkpoint that this program wrote"),
    pytest.param(
        [*folder("captioned"), "--trainer.accelerator=gpu"],
        "set --trainer.accelerator cpu or auto",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    ),
    (["fit", "configs/model/lrm_tiny.yaml"], "give each file as --config FILE"),
    (["fit", "--config=configs/one_card/sd15_align.yaml"], "PROMPTS is not set; say PROMPTS=VALUE"),
    (["score", "nowhere", "s.csv", NO_WEIGHTS], "'nowhere' is neither a folder, a file, nor a pattern"),
    (["score", "https://example.com/1.png", "s.csv", NO_WEIGHTS], "give a folder, a pattern such as"),
    (["score", "pairs.zip", "s.csv", NO_WEIGHTS], "give a folder, a pattern such as"),
    (["score", "empty", "s.csv", NO_WEIGHTS], "no picture in empty (.jpg"),
    (["score", "one", "s.csv", NO_WEIGHTS], "or give one for all with --prompt"),
    (["score", "list.csv", "s.csv", NO_WEIGHTS], "name it with --image_column"),
    (["score", "one", "s.csv", NO_WEIGHTS, CAPTION], "'runs/first' is not here"),
    (["score", "one", "s.csv", CAPTION], "model is missing; give it"),
    (["generate", "none.txt", "made", "--policy.source=sd_tiny"], "none.txt holds no prompt; write one per line"),
    (["generate", "a red cat", "made", "--policy.source=sd_tiny"], "give a text file with one prompt per line"),
    (["generate", "prompts.txt", "made"], "set policy.source, or the checkpoint of an alignment run"),
    (["generate", "prompts.txt", "full", "--policy.source=sd_tiny"], "choose another output_dir"),
    (["publish", "pairs", "made"], "give a checkpoint, or the folder of a model or of a run"),
    (["serve", "runs/first"], "'runs/first' is not here"),
    (["serve", "one/1.png"], "give a checkpoint that this program wrote"),
    (["serve", "runs/first", "--port=99999"], "choose one from 1 to 65535"),
    (["inspect", "empty"], "check the folder, or name a class, and its columns, by --reader"),
    (["inspect", "columns.csv"], "name those of a pair by --reader DatasetPairReader"),
    (["inspect", "pairs"], "give chosen/ and rejected/ images of equal names, with captions"),
    (["inspect", "https://example.com/pairs.csv"], "name a data set of the hub as --reader CLASS with its id"),
]


@pytest.mark.parametrize(("command", "told"), rotated_after(30, MISTAKES))
def test_a_mistake_is_answered_in_one_line(command: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, *command)
    assert told in line and len(line) < 500


def test_a_table_with_semicolons_is_read(_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (_files / "words.csv").read_text().replace("left", "a").replace(",", ";")
    (_files / "semicolons.csv").write_text(text)
    main(["inspect", "semicolons.csv"])
    assert "  a wins                          1 (100.0 %)" in capsys.readouterr().out
