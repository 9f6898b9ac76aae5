"""Reward models on the hub, by its real client against a hub on this machine; and what is said without one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from latentreward.core.errors import InputError
from latentreward.reward import RewardModel
from tests.alignment.rewards.stored import write_run
from tests.marks import rotated_after
from tests.reward.scoring.stub_hub import StubHub, running_hub, set_hub
from tests.reward.scoring.test_pretrained import scores
from tests.reward.scoring.test_published import write_lrm
from tests.tiny_pipelines import pipeline_folder

pytestmark = pytest.mark.usefixtures("bases_here")

LORA = {"rank": 2, "alpha": 3.0}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubHub]:
    with running_hub(monkeypatch, tmp_path / "cache") as stub:
        yield stub


def uploaded(hub: StubHub, folder: Path, branch: str = "main") -> RewardModel:
    """A model whose folder the hub has as ``owner/reward``."""
    write_run(folder / "run", "dina", "sd35", lora=LORA)
    model = RewardModel.from_pretrained(folder / "run")
    model.save_pretrained(saved := folder / "saved")
    files = {path.relative_to(saved).as_posix(): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    hub.repositories["owner/reward", branch] = files
    return model


@pytest.mark.slow
def test_a_branch(hub: StubHub, tmp_path: Path) -> None:
    model = uploaded(hub, tmp_path, "v2")
    again = RewardModel.from_pretrained("owner/reward", revision="v2")
    assert torch.equal(scores(again), scores(model))
    assert again.source == "owner/reward@v2"
    assert "GET /api/models/owner/reward/revision/v2" in hub.requests
    with pytest.raises(InputError, match=r"'owner/reward' at revision 'v3' is .*hub .RevisionNotFoundError.") as caught:
        RewardModel.from_pretrained("owner/reward", revision="v3")
    assert "\n" not in str(caught.value)


def test_a_folder_of_a_repository(hub: StubHub, tmp_path: Path) -> None:
    write_lrm(tmp_path / "lrm_sd15", "sd15")
    files = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    hub.repositories["owner/LRM", "main"] = {**files, "huge.bin": b"0" * 1000}
    base = pipeline_folder("sd15")
    model = RewardModel.from_pretrained("owner/LRM/lrm_sd15", base=base)
    assert torch.equal(scores(model), scores(RewardModel.from_pretrained(tmp_path / "lrm_sd15", base=base)))
    assert not any("huge.bin" in request for request in hub.requests)
    before = len(hub.requests)
    for name in ("owner/LRM", "owner/LRM/lrm_sdxl"):
        with pytest.raises(InputError, match=r"add one of its folders: lrm_sd15$"):
            RewardModel.from_pretrained(name)
    assert not any("resolve" in request for request in hub.requests[before:])


def test_a_repository_without_a_reward_is_not_downloaded(hub: StubHub) -> None:
    hub.repositories["owner/sdxl", "main"] = {"model_index.json": b"{}", "unet/huge.safetensors": b"0" * 1000}
    with pytest.raises(InputError, match=r"'owner/sdxl' does not point to a reward model; check the name$"):
        RewardModel.from_pretrained("owner/sdxl")
    assert not any("resolve" in request for request in hub.requests)


@pytest.mark.parametrize("name", rotated_after(2, ["nothing", "./owner/name", "/none/at/all", "x.ckpt", "~/reward"]))
def test_names_that_are_no_hub_ids_ask_nobody(name: str, hub: StubHub) -> None:
    with pytest.raises(InputError, match=f"reward model '{name}' does not exist"):
        RewardModel.from_pretrained(name)
    assert not hub.requests


@pytest.mark.slow
def test_without_a_network_the_cache_will_do(hub: StubHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = uploaded(hub, tmp_path)
    RewardModel.from_pretrained("owner/reward")
    set_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")  # nobody listens there
    assert torch.equal(scores(RewardModel.from_pretrained("owner/reward")), scores(model))
    with pytest.raises(InputError, match=r"'owner/other' is not here and cannot be .* .the hub does not answer"):
        RewardModel.from_pretrained("owner/other")
