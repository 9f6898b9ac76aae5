"""Nulls, numbers out of range and YAML that would be misread, through the command line."""

import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from latentreward.apps.cli import main
from tests.marks import rotated_after

STACK = ("lrm_tiny", "model"), ("tinyworld_pickapic", "data"), ("cpu", "trainer")
FIT = ["fit", *(f"--config=configs/{folder}/{name}.yaml" for name, folder in STACK)]
READER = "{class_path: JSONLPairReader, init_args: {file: pairs.jsonl}}"
FILTERED = f"{{class_path: FilteredReader, init_args: {{reader: {READER}, scores: s.csv, floors: {{x: abc}}}}}}"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LATENTREWARD_DEBUG", raising=False)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2, line
    return line.removeprefix("latentreward: error: ")


def refusal_of(text: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The line for a fit of the tiny LRM with one more YAML file."""
    Path("more.yaml").write_text(text)
    return refusal(capsys, *FIT, "--config=more.yaml").removeprefix("more.yaml: ")


TEXTS = [
    ("trainer: {accelerator: null}", "trainer.accelerator"),
    ("model: {init_args: {eval_timesteps: [1, null]}}", "model.eval_timesteps"),
    ("trainer:\n  max_steps: 3\n  max_steps: 4\n", "line 3: 'max_steps'"),
    ("trainer: {callbacks: !!python/name:value ''}", "could not determine a constructor for the tag"),
    ("a: &a [*a]", "line 1: more than 100000 values"),
    ("\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]), "line "),
    ("[" * 200 + "]" * 200, "more than 100 lists"),
    ("trainer: []", "trainer: expected a mapping"),
    ("__path__: x", "__path__: no setting"),
    ("trainer: {__orig__: x}", "trainer.__orig__: no setting"),
    ("policy: {}", "policy: no setting"),
    ("trainer: {speed: {}}", "trainer.speed: no setting"),
    ("model: {init_args: {speed: {}}}", "model: speed: no setting"),
    ("nan_guard: 5", "nan_guard: expected a mapping"),
    ("trainer: {callbacks: [{}]}", "trainer.callbacks: {}"),
    ("trainer: {max_steps: '${trainer.max_steps}'}", "trainer.max_steps: the interpolation"),
    ("trainer: {default_root_dir: '${oc.env:NO_SUCH}'}", "trainer.default_root_dir: the environment variable NO_S"),
    ("model: {init_args: {optimizer: {init_args: {lr: .inf}}}}", "model.optimizer.lr: inf"),
    ("model: {init_args: {eval_timesteps: [1, .nan]}}", "model.eval_timesteps[1]: nan"),
    ("trainer: {val_check_interval: {}}", "trainer.val_check_interval: {}"),
    ("seed_everything: -1", "seed_everything: -1"),
    (
        f"data: {{class_path: PreferenceDataModule, init_args: {{train: {FILTERED}}}}}",
        "data.train.floors: expected float",
    ),
    ("model: {init_args: {noise_per_image: null}}", "model.noise_per_image"),
    ("model: {init_args: {head: {init_args: {guidance: null}}}}", "model.head.guidance"),
    ("model: {init_args: {optimizer: {init_args: {lr: null}}}}", "model.optimizer.lr"),
    ("model: {init_args: {backbone: {init_args: {lora: {rank: null}}}}}", "model.backbone.lora.rank"),
    ("trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {save_top_k: null}}]}", "trainer.callbacks"),
    ("trainer: null", "trainer"),
    ("model: {class_path: null}", "model.class_path"),
    ("model: {init_args: {loss: {init_args: null}}}", "model.init_args.loss.init_args"),
    ("model: {init_args: {optimizer: {init_args: {lr: 1.0e18}}}}", "model.optimizer.lr: 1e+18"),
    ("model: {init_args: {optimizer: {init_args: {lr: -1.0}}}}", "model.optimizer.lr: -1.0"),
    ("model: {init_args: {backbone: {init_args: {lora: {alpha: -1}}}}}", "model.backbone.lora.alpha: -1.0"),
    ("model: {init_args: {backbone: {init_args: {lora: {dropout: 1.0}}}}}", "model.backbone.lora.dropout: 1.0"),
    ("trainer: {accumulate_grad_batches: 0}", "trainer.accumulate_grad_batches: 0"),
    ("trainer: {limit_train_batches: 0}", "trainer.limit_train_batches: 0"),
    ("rank_timeout_s: 1.0e14", "rank_timeout_s: 100000000000000.0"),
    ("data: {init_args: {num_workers: 1000000000000000000}}", "data.num_workers: 1000000000000000000"),
]


@pytest.mark.parametrize(("text", "key"), rotated_after(22, TEXTS))
def test_a_file_is_refused(text: str, key: str, capsys) -> None:
    assert refusal_of(text, capsys).startswith(key)


OPTIONS = [
    (["--data.batch_size=null"], "data.batch_size: expected int, got null"),
    (["--data.batch_size=${trainer.max_time}"], "data.batch_size: expected int, got null"),
    (["--model.optimizer.lr=abc"], "model.optimizer.lr: expected float, got 'abc'"),
    (["--model.backbone=null"], "model: backbone is missing"),
    (["--model.metrics=Mine"], "model.metrics: expected list, got 'Mine'"),
    (["--trainer.max_steps=${data.steps}"], "trainer.max_steps: ${data.steps} is not set"),
    (["--model.backbone", "${data.steps}"], "model.init_args.backbone: ${data.steps} is not set"),
    (["--data=PreferenceDataModule", "--data.sources=ignore"], "data: Option 'sources'"),
    (["--data.batch_size=${oc.env:NO_NUMBER,null}"], "data.batch_size: expected int, got null"),
    (["--data.batch_size=~"], "data.batch_size: expected int, got null"),
    (["--model.head=null"], "model.head: expected the name of a class, got null"),
    (["--model.eval_timesteps=[{}]"], "model: {} in a list"),
    (["--resume_override=lr"], "resume_override: expected list, got 'lr'"),
    (["--trainer.max_steps=${steps"], "trainer.max_steps: the interpolation is not closed"),
]


@pytest.mark.parametrize(("options", "key"), rotated_after(8, OPTIONS))
@pytest.mark.usefixtures("package_backbones")
def test_an_option_is_refused(options: list[str], key: str, capsys) -> None:
    assert refusal(capsys, *FIT, *options).startswith(key)


def test_settings_before_their_class_are_told_so(capsys) -> None:
    Path("early.yaml").write_text("model: {init_args: {loss: {batch_coeff: 0.1}}}\n")
    for option, key in (
        ("--config=early.yaml", "early.yaml: model: Option 'loss.batch_coeff'"),
        ("--model.loss.batch_coeff=0.1", "model: unrecognized arguments: --loss.batch_coeff=0.1"),
    ):
        assert refusal(capsys, "fit", option, *FIT[1:]).startswith(key)


@pytest.mark.parametrize("value", ["null", "[8]", "no.yaml"])
@pytest.mark.parametrize("field", ["model.policy.lora", "model.policy"])
def test_a_group_of_settings_that_is_no_mapping_is_refused(value: str, field: str, capsys) -> None:
    group = f"{{lora: {value}}}" if field.endswith("lora") else value
    Path("more.yaml").write_text(f"model: {{init_args: {{policy: {group}}}}}")
    for given in ("--config=more.yaml", f"--{field}={value}"):
        line = refusal(capsys, "fit", "--config=configs/align/lpo_tiny.yaml", given).removeprefix("more.yaml: ")
        assert line.startswith(f"{field}: ") and value.strip("[]") in line


@pytest.mark.parametrize("text", ["lora: {rank: abc}", "lora: {rank: [\n"])
def test_the_file_of_a_group_is_named(text: str, capsys) -> None:
    Path("group.yaml").write_text(text)
    assert "group.yaml" in refusal(capsys, "fit", "--config=configs/align/lpo_tiny.yaml", "--model.policy=group.yaml")


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


def test_files_that_are_no_settings_are_named_in_few_words(capsys) -> None:
    Path("binary.yaml").write_bytes(b"model: \x00\xff")
    assert refusal(capsys, "score", "--config=binary.yaml").startswith("binary.yaml: ")
    Path("long.yaml").write_text(f"model: [{'x, ' * 10_000}x]")
    line = refusal(capsys, "score", "pictures", "scores.csv", "--config=long.yaml")
    assert line.startswith("long.yaml: model: ") and len(line) < 400


def test_a_setting_below_a_plain_value_is_named(capsys) -> None:
    line = refusal(capsys, "generate", "prompts.txt", "made", "--policy.source=sd_tiny", "--prompts.limit", "2")
    assert line.startswith("prompts: expected str")


def test_missing_data_are_named_before_anything_is_loaded(capsys) -> None:
    assert refusal(capsys, "fit", FIT[1], FIT[3], "--model.backbone.source=/nowhere").startswith("data is missing")


@pytest.mark.parametrize("flag", [["--check"], ["--check", "true"], ["--check=true"]])
def test_flags_take_a_value_or_none(flag: list[str], capsys) -> None:
    assert "out is not a cache" in refusal(capsys, "cache", "out", *flag)


def test_a_variable_is_named_with_the_file_that_reads_it(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("REWARD", raising=False)
    Image.new("RGB", (16, 16)).save("a.png")
    Path("images.csv").write_text("file,prompt\na.png,a cat\n")
    score = ("score", "images.csv", "scores.csv")
    Path("score.yaml").write_text("model: ${oc.env:REWARD,no_such_reward}")
    line = refusal(capsys, *score, "--config=score.yaml")
    assert "no_such_reward" in line and "environment variable REWARD" in line
    Path("score.yaml").write_text("model: ${oc.env:REWARD}")
    assert "score.yaml" in refusal(capsys, *score, "--config=score.yaml")
    assert "score.yaml" not in refusal(capsys, *score, "--model=${oc.env:REWARD}")


@pytest.mark.slow
def test_callbacks_that_lightning_cannot_tell_apart(capsys) -> None:
    text = "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {save_last: false}}, ModelCheckpoint]}"
    assert "every_n_train_steps" in refusal_of(f"data: {{init_args: {{train_pairs: 8, val_pairs: 4}}}}\n{text}", capsys)


def test_a_factory_without_return_type_is_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    Path("loss_factories.py").write_text("def smooth(width: float = 1.0):\n    return None\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    key = "model.loss: the function 'loss_factories.smooth'"
    assert refusal(capsys, *FIT, "--model.loss=loss_factories.smooth").startswith(key)


def test_a_window_of_steps_is_for_methods_that_learn_from_steps(capsys) -> None:
    line = refusal(capsys, "fit", "--config=configs/align/nft_tiny.yaml", "--config=configs/grpo/window.yaml")
    assert "configs/grpo/window.yaml: model: Option 'window.init_args.size'" in line


def test_prompts_of_a_file_for_a_run_on_the_tiny_world(capsys) -> None:
    align = ["fit", "--config=configs/align/lpo_tiny.yaml", "--data.prompts=prompts.txt"]
    line = refusal(capsys, *align)
    assert line.startswith("data: Option 'prompts'") and "--data PromptDataModule" in line
    with pytest.raises(SystemExit) as stop:
        main([align[0], align[1], "--data=PromptDataModule", align[2], "--print_config"])
    assert stop.value.code == 0
    given = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert (given["prompts"], given["batch_size"]) == ("prompts.txt", 64)
