"""What comes from others names registered classes alone: nothing is imported, resolved or downloaded as code."""

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
import yaml

from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.diffusion import LoRA
from latentreward.reward import RewardModel
from latentreward.reward.scoring.layouts.recipe import guarded_imports
from tests.alignment.rewards.stored import write_run
from tests.marks import slow_after
from tests.reward.scoring.stub_hub import StubHub, running_hub
from tests.reward.scoring.test_pretrained import scores
from tests.tiny_pipelines import pipeline_folder

pytestmark = pytest.mark.usefixtures("bases_here")

RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adapter": ("dina", "sd35", {"lora": {"rank": 2, "alpha": 3.0}, "tuning": "lora"}),
    "whole": ("lrm", "sd15", {}),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubHub]:
    with running_hub(monkeypatch, tmp_path / "cache") as stub:
        yield stub


def upload(hub: StubHub, folder: Path, name: str = "owner/run") -> str:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.repositories[name, "main"] = files
    return name


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    change(settings["model"]["init_args"])
    path.write_text(yaml.safe_dump(settings))


def refused(source: str | Path, message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        RewardModel.from_pretrained(source, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(RUNS))
def test_a_run_on_the_hub_scores_as_it_does_here(kind: str, hub: StubHub, tmp_path: Path) -> None:
    method, name, options = RUNS[kind]
    write_run(tmp_path / "run", method, name, **options)
    ours = RewardModel.from_pretrained(tmp_path / "run")
    theirs = RewardModel.from_pretrained(upload(hub, tmp_path / "run"))
    assert torch.equal(scores(theirs), scores(ours))
    assert theirs.recipe == ours.recipe
    theirs.save_pretrained(tmp_path / "saved")
    assert torch.equal(scores(RewardModel.from_pretrained(tmp_path / "saved")), scores(ours))


@pytest.mark.parametrize(
    "head",
    slow_after(
        1,
        [
            "latentreward.reward.CLIPProjectionHead",
            {"class_path": "latentreward.reward.CLIPProjectionHead"},
            {"class_path": "CLIPProjectionHead", "init_args": {"text_projection_source": None}},
        ],
    ),
)
def test_our_own_classes_by_any_of_their_names(head: Any, hub: StubHub, tmp_path: Path) -> None:
    write_run(tmp_path, "lrm", "sd15")
    edit(tmp_path, lambda model: model.update(head=head))
    RewardModel.from_pretrained(upload(hub, tmp_path))


CLASSES: dict[str, Callable[[dict[str, Any]], object]] = {
    "head": lambda model: model.update(head={"class_path": "this.Foo"}),
    "head by its path alone": lambda model: model.update(head="this.Foo"),
    "backbone": lambda model: model["backbone"].update(class_path="this.Foo"),
    "class inside a package of ours": lambda model: model.update(head="latentreward.this.Foo"),
}


@pytest.mark.parametrize("change", slow_after(1, CLASSES.values()), ids=list(CLASSES))
def test_foreign_classes_are_refused_before_they_are_imported(
    change: Callable[[dict[str, Any]], object], hub: StubHub, tmp_path: Path
) -> None:
    write_run(tmp_path, "dina", "sd35")
    edit(tmp_path, change)
    sys.modules.pop("this", None)
    refused(upload(hub, tmp_path), r"config\.yaml: model\.\w+: class '\S*this\.Foo' is not .*trust_remote_code=True")
    assert "this" not in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize("place", ["here", "hub"])
def test_trust_allows_all_and_nothing_else_does(
    place: str, hub: StubHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BASE", pipeline_folder("sd35"))
    write_run(tmp_path / "run", "dina", "sd35")
    edit(tmp_path / "run", lambda model: model["backbone"]["init_args"].update(source="${oc.env:BASE}"))
    write_run(tmp_path / "mine", "lrm", "sd15")
    head = {"class_path": "tests.reward.scoring.test_pretrained_damage.ForeignHead"}
    edit(tmp_path / "mine", lambda model: model.update(head=head))
    for folder in (tmp_path / "run", tmp_path / "mine"):
        source = str(folder) if place == "here" else upload(hub, folder, f"owner/{folder.name}")
        refused(source, "trust_remote_code=True")
        refused(source, "trust_remote_code=True", config=str(folder / "config.yaml"))
        RewardModel.from_pretrained(source, trust_remote_code=True)


@pytest.mark.slow
def test_variables_that_no_model_reads_need_no_trust(tmp_path: Path) -> None:
    write_run(tmp_path, "dina", "sd35")
    path = tmp_path / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings |= {"trainer": {"logger": {"class_path": "x.Y", "init_args": {"key": "${oc.env:UNSET_KEY}"}}}}
    settings["model"]["init_args"] |= {"metrics": "${oc.env:UNSET_KEY}"}
    path.write_text(yaml.safe_dump(settings))
    for trusted in (False, True):
        RewardModel.from_pretrained(tmp_path, trust_remote_code=trusted)


@pytest.mark.parametrize("setting", [{"source": "a/${name}"}, {"lora": {"target_modules": ["a/${name}"]}}], ids=str)
def test_a_setting_that_leads_to_a_variable_is_not_resolved(
    setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    write_run(tmp_path, "dina", "sd35")
    edit(tmp_path, lambda model: model["backbone"]["init_args"].update(setting))
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text() + "name: ${oc.env:SECRET}\n")
    refused(tmp_path, r"'a/\$\{name\}' would be resolved.*trust_remote_code=True")


@pytest.mark.slow
def test_what_was_downloaded_imports_nothing_of_its_own(
    hub: StubHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", "lrm", "sd15")
    (tmp_path / "run" / "beside").mkdir()
    code = "from tests.reward.scoring.test_pretrained_damage import ForeignHead\nprint('ran')\n"
    for name in ("beside.py", "beside/inner.py"):
        (tmp_path / "run" / name).write_text(code)
    RewardModel.from_pretrained(upload(hub, tmp_path / "run"))
    (here,) = (tmp_path / "cache").rglob("reward.ckpt")
    monkeypatch.syspath_prepend(str(here.parent))
    for path in ("beside.ForeignHead", "beside.inner.ForeignHead"):
        edit(tmp_path / "run", lambda model, path=path: model.update(head={"class_path": path}))
        name = upload(hub, tmp_path / "run", f"owner/{path.partition('.Foreign')[0]}")
        refused(name, "beside a model that came from others", trust_remote_code=True)
    assert "beside" not in sys.modules


def test_a_module_beside_a_model_that_a_link_leads_to_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "beside_a_link.py").touch()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.syspath_prepend(str(tmp_path / "link"))
    with guarded_imports(tmp_path / "link"), pytest.raises(InputError, match="beside a model that came from others"):
        importlib.import_module("beside_a_link")


@pytest.mark.slow
def test_settings_of_training_are_left_out_of_a_run(hub: StubHub, tmp_path: Path) -> None:
    write_run(tmp_path, "dina", "sd35")
    options = {"attention_backend": "flash_hub", "gradient_checkpointing": True}
    edit(tmp_path, lambda model: model["backbone"]["init_args"].update(options))
    RewardModel.from_pretrained(upload(hub, tmp_path))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["owner/kernel", "flash_attention_2", {"": "owner/kernel:name"}])
@pytest.mark.parametrize(("name", "part"), [("sd15", "text_encoder"), ("sd35", "text_encoder_3")])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_text_encoder_names_no_code_to_download(
    key: str, value: Any, name: str, part: str, device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", reached)
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder(name), folder)
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    factory = {"sd15": "sd15", "sd35": "sd35_medium"}[name]
    taps = {} if name == "sd15" else {"visual_taps": [1], "text_taps": [1], "lora": LoRA(2, 2.0), "tuning": "lora"}
    message = rf"{part}: its config.json names attn_implementation .*remove the entry$"
    with pytest.raises(InputError, match=message), torch.device(device):
        create_backbone(factory, source=str(folder), **taps)


def reached(*args: Any, **options: Any) -> None:
    """Stands where transformers would download the kernel."""
    raise AssertionError("transformers was asked for a kernel")
