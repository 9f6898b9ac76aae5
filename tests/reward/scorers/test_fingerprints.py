"""What tells a model or scorer that changed from the one that stored scores are of."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from latentreward.core.storage import hub
from latentreward.reward import CallableScorer, RewardModelScorer
from latentreward.reward.scorers.fingerprints import scorer_fingerprints
from latentreward.reward.scorers.tools import CommandScorer
from latentreward.reward.scoring.find import BLOCK, WHOLE, fingerprint


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


RUN = ("config.yaml", "logs/metrics.csv", "checkpoints/last.ckpt", "checkpoints/step.ckpt/.metadata")
MODEL = ("config.json", "head.safetensors", "base.safetensors", "adapter/adapter_config.json", "README.md")
PIPELINE = ("model_index.json", "unet/model.safetensors", "old.ckpt", "scheduler/scheduler_config.json")


@pytest.mark.parametrize(
    ("names", "changed", "matters"),
    [
        (RUN, "checkpoints/last.ckpt", True),
        (RUN, "config.yaml", True),
        (RUN, "logs/metrics.csv", False),
        (RUN, "events.out", False),
        (MODEL, "config.json", True),
        (MODEL, "base.safetensors", True),
        (MODEL, "adapter/adapter_config.json", True),
        (MODEL, "README.md", False),
        (MODEL, "example.png", False),
        (MODEL, ".cache/huggingface/x.lock", False),
        (PIPELINE, "unet/model.safetensors", True),
        (PIPELINE, "scheduler/scheduler_config.json", True),
    ],
)
def test_what_numbers_depend_on_counts_and_nothing_else(
    names: tuple[str, ...], changed: str, matters: bool, tmp_path: Path
) -> None:
    folder = fill(tmp_path / "it", *names)
    before = fingerprint(folder)
    fill(folder, changed)
    with (folder / changed).open("a") as file:
        file.write("!")
    assert (fingerprint(folder) != before) == matters


def test_a_checkpoint_goes_with_its_settings_and_no_neighbours(tmp_path: Path) -> None:
    folder = fill(tmp_path / "it", *RUN)
    checkpoint = folder / "checkpoints/last.ckpt"
    before = fingerprint(checkpoint)
    fill(folder, "checkpoints/other.ckpt", "checkpoints/log.txt")
    assert fingerprint(checkpoint) == before
    (folder / "config.yaml").write_text("another")
    assert fingerprint(checkpoint) != before


def test_a_copy_elsewhere_or_later_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [fill(tmp_path / name / "it", *RUN) for name in "ab"]
    os.utime(places[1] / "checkpoints/last.ckpt", (5, 5))
    assert fingerprint(places[0]) == fingerprint(places[1])
    monkeypatch.chdir(places[0])
    assert fingerprint(".") == fingerprint(places[0])
    assert str(tmp_path) not in fingerprint(places[0])


def test_the_module_of_a_users_function_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "own_scores.py"
    module.write_text("def score(prompts, images):\n    return [0.0 for _ in images]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer = CallableScorer(importlib.import_module("own_scores").score, "own")
    before = scorer_fingerprints(scorer)
    assert scorer_fingerprints(scorer) == before
    module.write_text(module.read_text().replace("0.0", "1.0"))
    assert scorer_fingerprints(scorer) != before


def test_large_files_by_blocks_and_tables_whole(tmp_path: Path) -> None:
    content = bytearray(WHOLE + 5)
    for name, place in (("a.safetensors", 0), ("b.safetensors", -1), ("a.csv", BLOCK + 1), ("b.csv", WHOLE + 1)):
        (tmp_path / name).write_bytes(content)
        before = fingerprint(tmp_path / name)
        changed = bytearray(content)
        changed[place] = 1
        (tmp_path / name).write_bytes(changed)
        assert fingerprint(tmp_path / name) != before


def test_base_and_settings_of_a_reward_and_the_script_of_a_command(tmp_path: Path) -> None:
    fill(tmp_path, "run/reward.ckpt", "base/model_index.json", "other.yaml", "score.py")
    reward = RewardModelScorer(
        str(tmp_path / "run"), base=str(tmp_path / "base"), config=str(tmp_path / "other.yaml"), device="cpu"
    )
    command = CommandScorer(["python", "score.py", "x" * 5000, "{scores}"], "mine", folder=tmp_path)
    scorers = {"base/model_index.json": reward, "other.yaml": reward, "run/reward.ckpt": reward, "score.py": command}
    for name, scorer in scorers.items():
        before = scorer_fingerprints(scorer)
        (tmp_path / name).write_text("another")
        assert scorer_fingerprints(scorer) != before


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Sets the commit that the hub tells, or that it is silent."""

    def answer(commit: str | None) -> None:
        hub.commit_on_hub.cache_clear()
        info = None if commit is None else type("Info", (), {"sha": commit})
        monkeypatch.setattr(hub, "model_info", lambda *_: info)

    return answer


def test_a_hub_id_is_known_by_its_commit(
    asked: Callable[[str | None], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked("1" * 40)
    assert fingerprint("owner/name/folder") == f"owner/name/folder at {'1' * 40}"
    asked(None)
    assert fingerprint("owner/name") == "owner/name at an unknown commit"
    cached = tmp_path / "models--owner--name"
    fill(cached, "refs/main", f"snapshots/{'2' * 40}/config.json")
    (cached / "refs/main").write_text("2" * 40)
    asked(None)
    assert fingerprint("owner/name") == f"owner/name at {'2' * 40}"
    assert fingerprint("nowhere") == "nowhere"
    hub.commit_on_hub.cache_clear()
