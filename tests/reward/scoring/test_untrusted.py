"""What comes from others names registered classes alone: nothing is imported, resolved or downloaded as code."""

import importlib
import json
import shutil
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
from latentreward.reward.scoring.recipe import guarded_imports
from tests.alignment.rewards.stored import write_run
from tests.marks import slow_after
from tests.reward.scoring.models import ForeignHead
from tests.reward.scoring.stub_hub import StubHub, running_hub
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


def test_a_module_beside_a_model_that_a_link_leads_to_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "beside_a_link.py").touch()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.syspath_prepend(str(tmp_path / "link"))
    with guarded_imports(tmp_path / "link"), pytest.raises(InputError, match="beside a model that came from others"):
        importlib.import_module("beside_a_link")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("key", "value", "name", "part"),
    [
        ("attn_implementation", "owner/kernel", "sd15", "text_encoder"),
        ("_attn_implementation", "flash_attention_2", "sd35", "text_encoder_3"),
        ("attn_implementation", {"": "owner/kernel:name"}, "sd35", "text_encoder_3"),
    ],
)
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


def test_a_foreign_head_needs_trust(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "lrm", "sd15")
    head = {"class_path": f"{ForeignHead.__module__}.ForeignHead"}
    edit(tmp_path / "run", lambda model: model.update(head=head))
    refused(tmp_path / "run", r"head: class '.*ForeignHead' is not registered .* trust_remote_code=True")
    model = RewardModel.from_pretrained(tmp_path / "run", trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved")
    refused(tmp_path / "saved", r"head: class '.*ForeignHead' is not registered .* trust_remote_code=True")
    again = RewardModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(again.head) is ForeignHead
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(again.score_latents("a cat", latents), model.score_latents("a cat", latents))
