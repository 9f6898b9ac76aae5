"""Nulls, numbers out of range and YAML that would be misread, through the command line."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from latentreward.apps.cli import main
from tests.marks import rotated_after

STACK = ("lrm_tiny", "model"), ("tinyworld_pickapic", "data"), ("cpu", "trainer")
FIT = ["fit", *(f"--config=configs/{folder}/{name}.yaml" for name, folder in STACK)]
FEW_PAIRS = "data: {init_args: {train_pairs: 8, val_pairs: 4}}\n"


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


@pytest.mark.parametrize(
    ("text", "field"),
    rotated_after(
        2,
        [
            ("trainer: {accelerator: null}", "trainer.accelerator"),
            ("model: {init_args: {noise_per_image: null}}", "model.noise_per_image"),
            ("model: {init_args: {loss: {init_args: {batch_coeff: null}}}}", "model.loss.batch_coeff"),
            ("model: {init_args: {head: {init_args: {guidance: null}}}}", "model.head.guidance"),
            ("model: {init_args: {optimizer: {init_args: {lr: null}}}}", "model.optimizer.lr"),
            ("model: {init_args: {eval_timesteps: [1, null]}}", "model.eval_timesteps"),
            ("model: {init_args: {backbone: {init_args: {lora: {rank: null}}}}}", "model.backbone.lora.rank"),
            (
                "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {save_top_k: null}}]}",
                "trainer.callbacks",
            ),
            ("data: {init_args: {batch_size: null}}", "data.batch_size"),
            ("trainer: null", "trainer"),
            ("model: {class_path: null}", "model.class_path"),
            ("model: {init_args: {loss: {init_args: null}}}", "model.init_args.loss.init_args"),
        ],
    ),
)
def test_null_is_refused_where_the_type_does_not_allow_it(text: str, field: str, capsys) -> None:
    line = refusal_of(text, capsys)
    assert line.startswith(field)
    assert "got null" in line


def test_settings_of_a_class_that_is_not_named_yet_are_told_so(capsys) -> None:
    Path("early.yaml").write_text("model: {init_args: {loss: {batch_coeff: 0.1}}}\n")
    line = refusal(capsys, "fit", "--config=early.yaml", *FIT[1:])
    assert line == (
        "early.yaml: model: Option 'loss.batch_coeff' is not accepted, since no file before this one names a class; "
        "give the one with model.class_path first"
    )


def test_an_option_before_the_file_that_names_its_class_is_told_so(capsys) -> None:
    line = refusal(capsys, "fit", "--model.loss.batch_coeff=0.1", *FIT[1:])
    assert line == (
        "model: unrecognized arguments: --loss.batch_coeff=0.1, since nothing before it names a class; give --config "
        "or --model CLASS first"
    )


def test_a_wrong_value_inside_a_mapping_is_named(capsys) -> None:
    reader = "{class_path: JSONLPairReader, init_args: {file: pairs.jsonl}}"
    train = f"{{class_path: FilteredReader, init_args: {{reader: {reader}, scores: s.csv, floors: {{x: abc}}}}}}"
    line = refusal_of(f"data: {{class_path: PreferenceDataModule, init_args: {{train: {train}}}}}", capsys)
    assert line == "data.train.floors: expected float, got 'abc'"


@pytest.mark.parametrize("value", ["null", "3", "[8]", "no.yaml"])
@pytest.mark.parametrize("field", ["model.policy.lora", "model.policy"])
@pytest.mark.parametrize("in_file", [True, False])
def test_a_group_of_settings_that_is_no_mapping_is_refused(value: str, field: str, in_file: bool, capsys) -> None:
    group = f"{{lora: {value}}}" if field.endswith("lora") else value
    Path("more.yaml").write_text(f"model: {{init_args: {{policy: {group}}}}}")
    given = "--config=more.yaml" if in_file else f"--{field}={value}"
    line = refusal(capsys, "fit", "--config=configs/align/lpo_tiny.yaml", given).removeprefix("more.yaml: ")
    assert line.startswith(f"{field}: expected a mapping of settings")
    assert value.strip("[]") in line


@pytest.mark.parametrize(
    ("text", "said"),
    [("lora: {rank: abc}", "group.yaml.*policy.lora.rank.*abc"), ("lora: {rank: [\n", r"group.yaml.*line 2, column 1")],
)
def test_what_is_wrong_in_the_file_of_a_group_is_said(text: str, said: str, capsys) -> None:
    Path("group.yaml").write_text(text)
    assert re.search(said, refusal(capsys, "fit", "--config=configs/align/lpo_tiny.yaml", "--model.policy=group.yaml"))


@pytest.mark.parametrize(
    "option",
    rotated_after(
        1,
        [
            "--model.head.init_args.text_projection_source",
            "--model.head.text_projection_source",
            "--model.init_args.head.init_args.text_projection_source",
            "--model.backbone.lora",
            "--model.loss",
            "--trainer.default_root_dir",
            "--trainer.logger",
        ],
    ),
)
@pytest.mark.parametrize("equals", [True, False])
def test_null_on_the_command_line_is_none(option: str, equals: bool, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*FIT, *([f"{option}=null"] if equals else [option, "null"]), "--print_config"])
    assert stop.value.code == 0
    value = yaml.safe_load(capsys.readouterr().out)
    for name in option.removeprefix("--").replace("init_args.", "").split("."):
        value = value.get("init_args", value)[name]
    assert value is None


@pytest.mark.parametrize(
    "value", rotated_after(2, ["null", "${trainer.max_time}", "${oc.env:NO_NUMBER,null}", "~", "${oc.decode:null}"])
)
def test_null_on_the_command_line_is_refused_where_the_type_does_not_allow_it(value: str, capsys) -> None:
    assert refusal(capsys, *FIT, f"--data.batch_size={value}").startswith("data.batch_size: expected int, got null")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("trainer:\n  max_steps: 3\n  max_steps: 4\n", "line 3: 'max_steps' is given twice, first in line 2"),
        ("trainer: {callbacks: !!python/name:value ''}", "could not determine a constructor for the tag"),
        ("a: &a [*a]", "line 1: more than 100000 values once aliases are replaced"),
        ("[" * 200 + "]" * 200, "more than 100 lists and mappings inside each other"),
        ("trainer: []", "trainer: expected a mapping of settings, got []"),
        ("__path__: x", "__path__: no setting has this name; remove it"),
        ("trainer: {__orig__: x}", "trainer.__orig__: no setting has this name; remove it"),
        ("policy: {}", "policy: no setting has this name; remove it"),
        ("trainer: {speed: {}}", "trainer.speed: no setting has this name; remove it"),
        ("model: {init_args: {speed: {}}}", "model: speed: no setting has this name; remove it"),
        ("nan_guard: 5", "nan_guard: expected a mapping of settings, got 5"),
        ("trainer: {callbacks: [{}]}", "trainer.callbacks: {} in a list names nothing"),
        ("trainer: {max_steps: '${trainer.max_steps}'}", "trainer.max_steps: the interpolation refers to itself"),
        ("trainer: {default_root_dir: '${oc.env:NO_SUCH}'}", "trainer.default_root_dir: the environment variable NO_S"),
    ],
)
def test_yaml_that_would_be_misread(text: str, line: str, capsys) -> None:
    assert refusal_of(text, capsys).startswith(line)


def test_aliases_that_multiply_are_refused_before_they_are_built(capsys) -> None:
    nine = [f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)]
    assert "once aliases are replaced" in refusal_of("\n".join(["a0: &a0 [x, x, x]", *nine]), capsys)


@pytest.mark.parametrize(
    ("text", "field"),
    rotated_after(
        3,
        [
            ("model: {init_args: {optimizer: {init_args: {lr: .inf}}}}", "model.optimizer.lr: inf"),
            ("model: {init_args: {optimizer: {init_args: {lr: 1.0e18}}}}", "model.optimizer.lr: 1e+18"),
            ("model: {init_args: {optimizer: {init_args: {lr: -1.0}}}}", "model.optimizer.lr: -1.0"),
            ("model: {init_args: {optimizer: {init_args: {weight_decay: .inf}}}}", "model.optimizer.weight_decay: inf"),
            ("model: {init_args: {eval_timesteps: [1, .nan]}}", "model.eval_timesteps[1]: nan"),
            ("model: {init_args: {backbone: {init_args: {lora: {alpha: -1}}}}}", "model.backbone.lora.alpha: -1.0"),
            ("model: {init_args: {backbone: {init_args: {lora: {dropout: 1.0}}}}}", "model.backbone.lora.dropout: 1.0"),
            ("trainer: {val_check_interval: {}}", "trainer.val_check_interval: {} is not a number"),
            ("trainer: {accumulate_grad_batches: -3}", "trainer.accumulate_grad_batches: -3"),
            ("trainer: {accumulate_grad_batches: 0}", "trainer.accumulate_grad_batches: 0"),
            ("trainer: {limit_train_batches: 0}", "trainer.limit_train_batches: 0"),
            ("trainer: {val_check_interval: 0}", "trainer.val_check_interval: 0"),
            ("seed_everything: -1", "seed_everything: -1"),
            ("rank_timeout_s: 1.0e14", "rank_timeout_s: 100000000000000.0"),
            ("data: {init_args: {num_workers: -1}}", "data.num_workers: -1"),
            ("data: {init_args: {num_workers: 1000000000000000000}}", "data.num_workers: 1000000000000000000"),
        ],
    ),
)
def test_numbers_outside_their_range(text: str, field: str, capsys) -> None:
    line = refusal_of(text, capsys)
    assert line.startswith(field)
    assert "is not finite" in line or "is outside" in line or "is not a number; give one in" in line


def test_a_file_that_is_no_text_is_refused_by_name(capsys) -> None:
    Path("binary.yaml").write_bytes(b"model: \x00\xff")
    assert refusal(capsys, "score", "--config=binary.yaml").startswith("binary.yaml: 'utf-8' codec can't decode")


def test_a_long_value_is_not_repeated_whole(capsys) -> None:
    Path("long.yaml").write_text(f"model: [{'x, ' * 10_000}x]")
    line = refusal(capsys, "score", "pictures", "scores.csv", "--config=long.yaml")
    assert line.startswith("long.yaml: model: expected str, got ")
    assert len(line) < 400


def test_a_setting_below_a_plain_value_is_named(capsys) -> None:
    line = refusal(capsys, "generate", "prompts.txt", "made", "--policy.source=sd_tiny", "--prompts.limit", "2")
    assert line == "prompts: expected str, which has no setting limit, got prompts.limit='2'"


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_missing_data_are_named_before_anything_is_loaded(command: str, capsys) -> None:
    line = refusal(capsys, command, FIT[1], FIT[3], "--model.backbone.source=/nowhere")
    assert line.startswith("data is missing; give it in a --config file, such as configs/data/")


def test_the_remedy_names_the_whole_setting(capsys) -> None:
    line = refusal(capsys, "fit", "--config=configs/model/lrm_tiny.yaml", "--trainer.logger=CSVLogger")
    assert line.endswith("give it in a --config file or as --trainer.logger.save_dir")


@pytest.mark.parametrize("flag", [["--check"], ["--check", "true"], ["--check=true"]])
def test_flags_take_a_value_or_none(flag: list[str], capsys) -> None:
    assert "out is not a cache" in refusal(capsys, "cache", "out", *flag)


@pytest.mark.slow
def test_a_variable_with_a_stand_in_is_named_when_that_fails(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("CLIP_L_PATH", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", "empty")
    text = "model: {init_args: {head: {init_args: {text_projection_source: '${oc.env:CLIP_L_PATH,some/clip}'}}}}"
    line = refusal_of(FEW_PAIRS + text, capsys)
    assert line.startswith("text_projection_source='some/clip'")
    assert line.endswith("or set the environment variable CLIP_L_PATH")


def test_so_is_one_in_a_command_without_classes(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("REWARD", raising=False)
    Image.new("RGB", (16, 16)).save("a.png")
    Path("images.csv").write_text("file,prompt\na.png,a cat\n")
    Path("score.yaml").write_text("model: ${oc.env:REWARD,no_such_reward}")
    line = refusal(capsys, "score", "images.csv", "scores.csv", "--config=score.yaml")
    assert "no_such_reward" in line
    assert line.endswith("or set the environment variable REWARD")


def test_an_unset_variable_is_not_put_down_to_a_file_of_an_earlier_command(monkeypatch, capsys) -> None:
    monkeypatch.delenv("REWARD", raising=False)
    Path("score.yaml").write_text("model: ${oc.env:REWARD}")
    assert "which score.yaml refers to" in refusal(capsys, "score", "a", "b.csv", "--config=score.yaml")
    assert "score.yaml" not in refusal(capsys, "score", "a", "b.csv", "--model=${oc.env:REWARD}")


@pytest.mark.slow
def test_callbacks_that_lightning_cannot_tell_apart(capsys) -> None:
    text = "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {save_last: false}}, ModelCheckpoint]}"
    assert "every_n_train_steps or every_n_epochs differ" in refusal_of(FEW_PAIRS + text, capsys)


@pytest.mark.parametrize(
    ("setting", "line"),
    rotated_after(
        4,
        [
            ("--model.optimizer.lr=abc", "model.optimizer.lr: expected float, got 'abc'"),
            (
                "--model.backbone=null",
                "model: backbone is missing; give it in a --config file or as --model.backbone; choose",
            ),
            ("--model.metrics=Mine", "model.metrics: expected list, got 'Mine'; did you mean [Mine]?"),
            (
                "--trainer.max_steps=${data.steps}",
                "trainer.max_steps: ${data.steps} is not set; name a setting in full, e.",
            ),
            (
                "--model.head=null",
                "model.head: expected the name of a class, got null; choose from CLIPProjectionHead,",
            ),
            ("--model.eval_timesteps=5", "model.eval_timesteps: expected list, got '5'; did you mean [5]?"),
            ("--model.eval_timesteps=[{}]", "model: {} in a list names nothing; give a class_path or a value"),
            ("--resume_override=lr", "resume_override: expected list, got 'lr'; did you mean [lr]?"),
            ("--trainer.max_steps=${steps", "trainer.max_steps: the interpolation is not closed; write ${NAME}"),
        ],
    ),
)
@pytest.mark.usefixtures("package_backbones")
def test_a_wrong_value_says_what_to_write(setting: str, line: str, capsys) -> None:
    assert refusal(capsys, *FIT, setting).startswith(line)


def test_an_interpolation_behind_a_blank_names_the_setting_from_the_top(capsys) -> None:
    line = refusal(capsys, *FIT, "--model.backbone", "${data.steps}")
    assert line.startswith("model.init_args.backbone: ${data.steps} is not set")


def test_a_factory_without_return_type_is_told_to_state_it(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    Path("loss_factories.py").write_text("def smooth(width: float = 1.0):\n    return None\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    remedy = "model.loss: the function 'loss_factories.smooth' does not state that it returns PreferenceLoss; write def"
    assert refusal(capsys, *FIT, "--model.loss=loss_factories.smooth").startswith(remedy)
    text = "model: {init_args: {loss: {class_path: loss_factories.smooth, init_args: {width: 2}}}}"
    assert refusal_of(text, capsys).startswith(remedy)


@pytest.mark.parametrize("method", ["awm", "nft"])
def test_a_window_of_steps_is_for_methods_that_learn_from_steps(method: str, capsys) -> None:
    files = (f"--config=configs/align/{method}_tiny.yaml", "--config=configs/grpo/window.yaml")
    line = refusal(capsys, "fit", *files)
    assert "configs/grpo/window.yaml: model: Option 'window.init_args.size' is not accepted; choose from" in line
    assert line.endswith(", trust_region; window is for TrajectoryGRPOModule")


def test_sources_are_a_setting_of_readers(capsys) -> None:
    line = refusal(capsys, *FIT, "--data=PreferenceDataModule", "--data.sources=ignore")
    assert line.startswith("data: Option 'sources' is not accepted; ")
    assert line.endswith("; readers have it: data.train.sources, data.val.sources")


def test_prompts_of_a_file_for_a_run_on_the_tiny_world(capsys) -> None:
    align = ["fit", "--config=configs/align/lpo_tiny.yaml"]
    line = refusal(capsys, *align, "--data.prompts=prompts.txt")
    assert line.startswith("data: Option 'prompts' is not accepted; choose from batch_size, ")
    assert line.endswith("; for prompts from a file say --data PromptDataModule too")
    with pytest.raises(SystemExit) as stop:
        main([*align, "--data=PromptDataModule", "--data.prompts=prompts.txt", "--print_config"])
    assert stop.value.code == 0
    given = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert (given["prompts"], given["batch_size"]) == ("prompts.txt", 64)
