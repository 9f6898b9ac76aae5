"""Mistakes in settings, through the command line: each is one line that begins with the setting, or names its file."""

import sys
from pathlib import Path

import pytest
import yaml

from latentreward.apps.cli import COMMANDS, main
from tests.marks import rotated_after

STACK = ("lrm_tiny", "model"), ("tinyworld_pickapic", "data"), ("cpu", "trainer")
FIT = ["fit", *(f"--config=configs/{folder}/{name}.yaml" for name, folder in STACK)]
LPO = ("fit", "--config=configs/align/lpo_tiny.yaml")
READER = "{class_path: JSONLPairReader, init_args: {file: pairs.jsonl}}"
FILTERED = f"{{class_path: FilteredReader, init_args: {{reader: {READER}, scores: s.csv, floors: {{x: abc}}}}}}"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LATENTREWARD_DEBUG", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("loss_factories.py").write_text("def smooth(width: float = 1.0):\n    return None\n")
    Path("early.yaml").write_text("model: {init_args: {loss: {batch_coeff: 0.1}}}\n")
    Path("group.yaml").write_text("lora: {rank: abc}")
    Path("binary.yaml").write_bytes(b"model: \x00\xff")
    Path("long.yaml").write_text(f"model: [{'x, ' * 10_000}x]")
    Path("variable.yaml").write_text("model: ${oc.env:NO_SUCH}")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2, line
    return line.removeprefix("latentreward: error: ")


TEXTS = [
    ("trainer: {accelerator: null}", "trainer.accelerator"),
    ("model: {init_args: {eval_timesteps: [1, null]}}", "model.eval_timesteps"),
    ("trainer:\n  max_steps: 3\n  max_steps: 4\n", "line 3: 'max_steps'"),
    ("trainer: {callbacks: !!python/name:value ''}", "could not determine a constructor for the tag"),
    ("a: &a [*a]", "line 1: more than 100000 values"),
    ("\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]), "line "),
    ("[" * 200 + "]" * 200, "line 1: more than"),
    ("trainer: []", "trainer: expected a mapping"),
    ("trainer: {max_steps: '${trainer.max_steps}'}", "trainer.max_steps: the interpolation"),
    ("trainer: {default_root_dir: '${oc.env:MY_TOKEN}'}", "${oc.env:MY_TOKEN} looks like a secret"),
    ("trainer: {default_root_dir: '${oc.env:NO_SUCH}'}", "trainer.default_root_dir: the environment variable NO_S"),
    ("model: {init_args: {optimizer: {init_args: {lr: .inf}}}}", "model.optimizer.lr: inf"),
    ("model: {init_args: {eval_timesteps: [1, .nan]}}", "model.eval_timesteps[1]: nan"),
    (
        f"data: {{class_path: PreferenceDataModule, init_args: {{train: {FILTERED}}}}}",
        "data.train.floors: expected float",
    ),
    ("model: {init_args: {noise_per_image: null}}", "model.noise_per_image"),
    ("model: {init_args: {backbone: {init_args: {lora: {rank: null}}}}}", "model.backbone.lora.rank"),
    ("trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {save_top_k: null}}]}", "trainer.callbacks"),
    ("trainer: null", "trainer"),
    ("model: {class_path: null}", "model.class_path"),
    ("model: {init_args: {loss: {init_args: null}}}", "model.init_args.loss.init_args"),
    ("data: {init_args: {batch_size: 0}}", "data.batch_size: 0"),
]


OPTIONS = [
    (["--data.batch_size=null"], "data.batch_size: expected int, got null"),
    (["--data.batch_size=${trainer.max_time}"], "data.batch_size: expected int, got null"),
    (["--model.optimizer.lr=abc"], "model.optimizer.lr: expected float, got 'abc'"),
    (["--model.backbone=null"], "model: backbone is missing"),
    (["--model.metrics=Mine"], "model.metrics: expected list, got 'Mine'"),
    (["--trainer.max_steps=${data.steps}"], "trainer.max_steps: ${data.steps} is not set"),
    (["--data=PreferenceDataModule", "--data.sources=ignore"], "data: Option 'sources'"),
    (["--data.batch_size=${oc.env:NO_NUMBER,null}"], "data.batch_size: expected int, got null"),
    (["--model.head=null"], "model.head: expected the name of a class, got null"),
    (["--trainer.max_steps=${steps"], "trainer.max_steps: the interpolation is not closed"),
    (["--model.lrr=1"], "model: Option 'lrr' is not accepted"),
    (["--modle.lr=1"], "unrecognized arguments: --modle.lr=1; did you mean 'model'?"),
    (["--trainer.max_epoch=2"], "unrecognized arguments: --trainer.max_epoch=2; did you mean 'trainer.max_epochs'?"),
    (["--trainer.max_epochs=x"], "trainer.max_epochs: expected int or null, got 'x'"),
    (["--model.head=GatedQFormer"], "model.head: unknown name 'GatedQFormer'; did you mean 'GatedQFormerHead'?"),
    (["--model.backbone=sd1.5"], "model.backbone: unknown name 'sd1.5'; did you mean 'sd15'?"),
    (["--model.backbone=plugins.X"], "model.backbone: No module named 'plugins' in the current folder, beside"),
    (["--model=latentreward.module.X"], "model: module 'latentreward' has no attribute 'module'"),
    (["--trainer.logger=CSVLoger"], "trainer.logger: unknown name 'CSVLoger'; did you mean 'CSVLogger'?"),
    (["--trainer=trainer.yaml"], "--trainer trainer.yaml: set --trainer.NAME=VALUE, or give a file as --config"),
    (["--trainer.devices="], "`devices`"),
    (["--performance=true"], "--performance true: expected a mapping of settings"),
    (["--config=nope.yaml"], "--config nope.yaml does not exist"),
    (["--config=configs/trainer/cpuu.yaml"], "--config configs/trainer/cpuu.yaml does not exist; did you mean"),
    (["--ckpt_path=nope.ckpt"], "ckpt_path: nope.ckpt does not exist"),
    (["--model.loss=loss_factories.smooth"], "model.loss: "),
    ([*LPO, "--model.policy=null"], "model.policy: "),
    ([*LPO, "--model.policy.lora=[8]"], "model.policy.lora: "),
    ([*LPO, "--model.policy=group.yaml"], "group.yaml"),
    (
        [*LPO, "--data.prompts=prompts.txt"],
        "data: Option 'prompts' is not accepted",
    ),
    (["fit"], "model is missing; give it in a --config file or as --model"),
    (["fit", FIT[1], FIT[3], "--model.backbone.source=/nowhere"], "data is missing"),
    (["fit", "--config=early.yaml", *FIT[1:]], "early.yaml: model: Option 'loss.batch_coeff'"),
    (["fit", "--model.loss.batch_coeff=0.1", *FIT[1:]], "model: unrecognized arguments: --loss.batch_coeff=0.1"),
    (["fit", "--config=configs/align/nft_tiny.yaml", "--config=configs/grpo/window.yaml"], "configs/grpo/window.yaml"),
    (["consolidate"], "checkpoint is missing; give it in a --config file or as --checkpoint"),
    (["evaluate-policy", "out", "--policy.pipeline=sd_tiny"], "scorers is missing; give it in a --config file or as"),
    (["generate", "prompts.txt", "made", "--policy.source=sd_tiny", "--prompts.limit", "2"], "prompts: expected str"),
    (["score", "--config=binary.yaml"], "binary.yaml: "),
    (["score", "pictures", "scores.csv", "--config=long.yaml"], "long.yaml: model: "),
    (["score", "a", "b", "--model=${oc.env:NO_SUCH}"], "model: the environment variable NO_SUCH is not set"),
    (["score", "a", "b", "--config=variable.yaml"], "model: the environment variable NO_SUCH is not set"),
    (["fti"], "unknown command 'fti'; did you mean 'fit'?"),
    ([], "no command; choose from benchmark, "),
]


@pytest.mark.parametrize(("wrong", "key"), rotated_after(40, [*TEXTS, *OPTIONS]))
@pytest.mark.usefixtures("package_backbones")
def test_a_mistake_is_one_line_that_names_the_setting(wrong: str | list[str], key: str, capsys) -> None:
    """``wrong`` is a YAML file after those of the tiny LRM, options after them, or a whole command."""
    if isinstance(wrong, str):
        Path("more.yaml").write_text(wrong)
        wrong = ["--config=more.yaml"]
    whole = not wrong or wrong[0] in (*COMMANDS, "fti")
    line = refusal(capsys, *(() if whole else FIT), *wrong).removeprefix("more.yaml: ")
    assert (line.startswith(key) or (key.endswith(".yaml") and key in line)) and len(line) < 500, line


NULLS = ("model.head.init_args.text_projection_source", "model.backbone.lora", "model.loss", "trainer.logger")


@pytest.mark.parametrize("option", rotated_after(1, NULLS))
@pytest.mark.parametrize("equals", [True, False])
def test_null_on_the_command_line_is_none(option: str, equals: bool, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*FIT, *([f"--{option}=null"] if equals else [f"--{option}", "null"]), "--print_config"])
    assert stop.value.code == 0
    value = yaml.safe_load(capsys.readouterr().out)
    for name in option.replace("init_args.", "").split("."):
        value = value.get("init_args", value)[name]
    assert value is None


@pytest.mark.parametrize("flag", [["--check"], ["--check", "true"], ["--check=true"]])
def test_flags_take_a_value_or_none(flag: list[str], capsys) -> None:
    assert "out is not a cache" in refusal(capsys, "cache", "out", *flag)
