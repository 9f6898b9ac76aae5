"""``latentreward export`` of a reward: the authors' layouts load to the same scores, and hold what they can."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft.tuners.lora import LoraLayer

from latentreward.apps.cli import main
from latentreward.core.errors import InputError
from latentreward.data.image_sizes import OneSize
from latentreward.reward import PublishedSettings, RewardModel, ScoringNoise
from latentreward.reward.scoring.exporting import export_reward
from tests.alignment.rewards.stored import write_run
from tests.marks import rotated_after
from tests.reward.scoring.models import PROMPTS, pictures
from tests.reward.scoring.test_published import write_dina, write_lrm
from tests.tiny_pipelines import pipeline_folder

SMALL = {"tuning": "lora", "lora": {"rank": 2, "alpha": 3.0}}


def scores_of(model: RewardModel) -> torch.Tensor:
    return model.score(PROMPTS, pictures(len(PROMPTS)), batch_size=3)


def export(source: Path, output: Path, layout: str, *options: str) -> None:
    main(["export", str(source), str(output), f"--format={layout}", *options])


def loaded_as_told(output: Path, told: str) -> RewardModel:
    """The exported folder, loaded by the flags that the command has printed."""
    words = next(line for line in told.splitlines() if line.startswith("load it with ")).split()[3:]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    base = flags.pop("--base")
    kinds = {"guidance": float, "multi_scale": str, "rms_eps": float, "t5_length": int}
    settings = {name: kinds[name](flags[f"--published.{name}"]) for name in kinds if f"--published.{name}" in flags}
    return RewardModel.from_pretrained(output, base=base, published=PublishedSettings(**settings))


def without_text_projection(run: Path) -> None:
    """As LRM-SDXL is trained."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["init_args"]["head"]["init_args"] = {"project_text": False}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoint = torch.load(run / "reward.ckpt", weights_only=True)
    del checkpoint["state_dict"]["model.head.text_projection.weight"]
    torch.save(checkpoint, run / "reward.ckpt")


RUNS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("diffusion-rm", "dina", "sd35", SMALL),
    ("lpo", "lrm", "sd15", {"text_encoder_tuning": "frozen"}),
    ("lpo", "lrm", "sdxl", {**SMALL, "text_encoder_tuning": "lora"}),
    ("lpo", "lrm", "sd21", {**SMALL, "text_encoder_tuning": "frozen"}),
    ("lpo", "lrm", "sd15", {}),
    ("diffusion-rm", "dina", "sd3", {**SMALL, "num_layers": 4}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "method", "name", "options"), rotated_after(2, RUNS))
def test_a_run_loads_again_to_its_scores(
    layout: str, method: str, name: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = tmp_path / "run", tmp_path / "exported"
    write_run(run, method, name, **options)
    if name == "sdxl":
        without_text_projection(run)
    export(run, output, layout)
    model = RewardModel.from_pretrained(run)
    again = loaded_as_told(output, capsys.readouterr().out)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if layout == "lpo" and "lora" in options else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(scores_of(again), scores_of(model), **tolerance)
    assert any(isinstance(module, LoraLayer) for module in again.modules()) == (layout == "diffusion-rm")
    assert not any(str(tmp_path) in path.read_text() for path in output.rglob("*.json"))


def test_what_the_layout_does_not_hold_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", "dina", "sd35", **SMALL, frozen_dtype="bfloat16")
    model = RewardModel.from_pretrained(tmp_path / "run")
    model.noise, model.image_sizes = ScoringNoise(sigmas=(0.2, 0.7)), OneSize(16, 16)
    told = export_reward(model, tmp_path / "exported", "diffusion-rm", base_name="owner/base")
    assert told[1].startswith("not held by this layout: noise sigma 0.2+0.7")
    assert "image sizes 16x16, EXIF orientation (ignore)" in told[1]
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["model"]["backbone_model_id"] == "owner/base"


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, arguments)])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


@pytest.mark.slow
def test_what_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "lrm", "lrm", "sd15")
    write_run(tmp_path / "dina", "dina", "sd35", **SMALL, text_encoder_tuning="frozen")
    new = tmp_path / "new"
    for run, layout, problem in (
        ("lrm", "diffusion-rm", "a GatedQFormerHead on SD3DiTBackbone, and this is a CLIPProjectionHead on SDUNet"),
        ("dina", "lpo", "a CLIPProjectionHead on SDUNetBackbone, and this is a GatedQFormerHead on SD3DiT"),
        ("dina", "kohya", "is for policies (for a reward set diffusion-rm or lpo): "),
    ):
        assert problem in refused(capsys, tmp_path / run, new, f"--format={layout}")
    assert "base_name is for diffusion-rm" in refused(capsys, tmp_path / "lrm", new, "--format=lpo", "--base_name=a/b")
    assert "dtype=float16 is for policies" in refused(capsys, tmp_path / "lrm", new, "--format=lpo", "--dtype=float16")
    assert "base is for rewards" in refused(capsys, tmp_path / "lrm", new, "--base=x")
    assert not new.exists()


PROBLEMS: list[tuple[str, str, dict[str, Any], str]] = [
    ("dina", "sd35", {"tuning": "frozen"}, "and here that is the head alone"),
    ("dina", "sd35", {"tuning": "full"}, "the LoRA of transformer, and here that is transformer"),
    ("dina", "sd35", {**SMALL, "text_taps": []}, "reads the text tokens of one block at least"),
    ("dina", "sd35", {**SMALL, "load_t5": False}, "takes the base's T5, and here load_t5 is false"),
    ("dina", "sd35", {**SMALL, "pooled_text": "t5"}, "takes pooled_text clip, and here that is t5"),
    ("lrm", "sd15", {"visual_taps": [1, 3]}, r"visual_taps is \[1, 3\]"),
    ("lrm", "sdxl", {}, "on SDXL it has no projection of the text, and here project_text is true"),
]


@pytest.mark.parametrize(("method", "name", "options", "message"), rotated_after(2, PROBLEMS))
def test_a_part_that_the_layout_has_no_place_for(
    method: str, name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", method, name, **options)
    model, layout = RewardModel.from_pretrained(tmp_path / "run"), "diffusion-rm" if method == "dina" else "lpo"
    with pytest.raises(InputError, match=message):
        export_reward(model, tmp_path / "new", layout)  # type: ignore[arg-type]


@pytest.mark.slow
def test_trained_constants_of_the_logistic_are_not_lost_in_silence(tmp_path: Path) -> None:
    write_dina(tmp_path / "published")
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    config["model"]["use_logistic"] = True
    (tmp_path / "published" / "config.json").write_text(json.dumps(config))
    model = RewardModel.from_pretrained(tmp_path / "published")
    export_reward(model, tmp_path / "exported", "diffusion-rm", base_name=pipeline_folder("sd35"))
    assert torch.equal(scores_of(RewardModel.from_pretrained(tmp_path / "exported")), scores_of(model))
    model.head.logistic.eta4.data.mul_(2)
    with pytest.raises(InputError, match="does not hold eta3 and eta4"):
        export_reward(model, tmp_path / "new", "diffusion-rm")


def test_a_layout_loaded_without_its_base_is_not_exported(tmp_path: Path) -> None:
    write_lrm(tmp_path / "published", "sd15")
    with pytest.raises(InputError, match="loaded without its base"):
        export_reward(RewardModel.from_pretrained(tmp_path / "published"), tmp_path / "new", "lpo")
