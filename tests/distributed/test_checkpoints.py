"""A checkpoint of any strategy and form goes on under any other, and evaluates on one device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import NaNGuard
from torch.distributed.tensor import DTensor

from latentreward.apps.commands.consolidate import consolidate
from latentreward.core.checkpoints.fsdp2 import FSDP2Strategy
from latentreward.core.checkpoints.shards import is_sharded, read_sharded
from latentreward.core.errors import InputError
from tests.distributed.ranks import on_ranks
from tests.distributed.runs import fit, make_trainer, saved_run, small_model, validated, world, write_pipelines
from tests.distributed.strategies import STRATEGIES

pytestmark = pytest.mark.slow


def saved_and_resumed(folder: Path) -> dict[str, Any]:
    """On ranks: whole runs in both forms, and runs that go on from the middle of each other's and of one device's."""
    write_pipelines()
    results = {kind: saved_run(folder / kind, STRATEGIES[kind]()) for kind in ("fsdp2", "sharded", "ddp")}
    for kind, source in (("fsdp2", "fsdp2"), ("sharded", "sharded"), ("fsdp2", "alone"), ("ddp", "fsdp2")):
        checkpoint = folder / source / "epoch=0.ckpt"
        results[f"{source} -> {kind}"] = saved_run(folder / f"{source}-{kind}", STRATEGIES[kind](), checkpoint)
    for kind in ("fsdp2", "sharded"):
        results[f"validated {kind}"] = validated(folder, folder / kind / "epoch=1.ckpt", FSDP2Strategy())
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    alone = saved_run(folder / "alone")
    first, second = on_ranks("tests.distributed.test_checkpoints:saved_and_resumed", folder, timeout=900)
    assert_equal(first, second, 0.0)
    return folder, {**first, "alone": alone}


def assert_equal(one: Any, other: Any, tolerance: float) -> None:
    """Same names, and values within ``tolerance``; 0 asks for the same bits."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name], tolerance)
    else:
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["fsdp2", "sharded"])
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(kind: str, runs: tuple[Path, dict[str, Any]]) -> None:
    resumed, whole = runs[1][f"{kind} -> {kind}"], runs[1][kind]
    for part in ("weights", "average", "moments", "metrics"):
        assert_equal(resumed[part], whole[part], 0.0)


@pytest.mark.parametrize("name", ["fsdp2", "sharded", "ddp", "alone -> fsdp2", "fsdp2 -> ddp"])
def test_every_way_ends_with_the_weights_average_and_moments_of_one_device(
    name: str, runs: tuple[Path, dict[str, Any]]
) -> None:
    for part in ("weights", "average", "moments"):
        assert_equal(runs[1][name][part], runs[1]["alone"][part], 1e-5)
    assert runs[1][name]["metrics"]["val/margin"] == pytest.approx(runs[1]["alone"]["metrics"]["val/margin"], abs=1e-5)
    if "->" not in name:
        assert runs[1][name]["best"] == pytest.approx(runs[1]["alone"]["best"], abs=1e-5)


@pytest.fixture(scope="module")
def forms(runs: tuple[Path, dict[str, Any]]) -> dict[str, Path]:
    folder = runs[0]
    consolidate(folder / "sharded" / "epoch=0.ckpt", folder / "one.ckpt")
    return {
        "full": folder / "fsdp2" / "epoch=0.ckpt",
        "sharded": folder / "sharded" / "epoch=0.ckpt",
        "consolidated": folder / "one.ckpt",
    }


def test_one_file_and_shards_hold_the_same(forms: dict[str, Path]) -> None:
    assert is_sharded(forms["sharded"])
    full, one = (torch.load(forms[form], weights_only=True) for form in ("full", "consolidated"))
    trained = {name for name, p in small_model().named_parameters() if p.requires_grad}
    for content in (full, one, read_sharded(forms["sharded"])):
        assert content.keys() == full.keys()
        assert content["state_dict"].keys() == trained
        assert not set(content["base"]["names"]) & trained
        assert_equal(content["state_dict"], full["state_dict"], 0.0)
        optimizers = [part["optimizer_states"][0] for part in (content, full)]
        assert_equal(*(optimizer["state"] for optimizer in optimizers), 0.0)
        assert optimizers[0]["param_groups"] == optimizers[1]["param_groups"]


@pytest.mark.parametrize("form", ["full", "sharded", "consolidated"])
def test_each_form_resumes_on_one_device(
    form: str, forms: dict[str, Path], runs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    resumed = saved_run(tmp_path, resume=forms[form])
    for part in ("weights", "average", "moments"):
        assert_equal(resumed[part], runs[1]["alone"][part], 1e-5)


def test_the_average_serves_validation_and_the_choice_of_the_best_wherever_it_is_loaded(
    runs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, results = runs
    last = folder / "sharded" / "epoch=1.ckpt"
    consolidate(last, tmp_path / "one.ckpt")
    consolidate(last, tmp_path / "average.ckpt", average=True)
    in_training = results["sharded"]["metrics"]["val/margin"]
    found = {
        **{kind: results[f"validated {kind}"] for kind in ("fsdp2", "sharded")},
        "shards": validated(tmp_path, last),
        "one file": validated(tmp_path, tmp_path / "one.ckpt"),
        "exported": validated(tmp_path, tmp_path / "average.ckpt", average=False),
    }
    assert found == pytest.approx(dict.fromkeys(found, in_training), abs=1e-6)
    assert abs(validated(tmp_path, last, average=False) - in_training) > 1e-4
    best = max(validated(tmp_path, folder / "sharded" / f"epoch={epoch}.ckpt") for epoch in range(2))
    assert results["sharded"]["best"] == pytest.approx(best, abs=1e-6)


def refused_to_save(folder: Path) -> dict[str, str]:
    """On ranks: what each says when a weight of the last one alone is not finite."""
    write_pipelines()
    said = {}
    for kind, strategy in STRATEGIES.items():
        guard, module = NaNGuard(), small_model()
        trainer = make_trainer(folder / kind, strategy(), callbacks=[guard])
        fit(module, trainer)
        if world()[0] == 1:
            weight = next(p for p in module.parameters() if p.requires_grad).data
            (weight.to_local() if isinstance(weight, DTensor) else weight).view(-1)[0] = float("nan")
        guard.setup(trainer, module, "fit")
        with pytest.raises(InputError) as refused:
            trainer.save_checkpoint(folder / f"{kind}.ckpt")
        said[kind] = str(refused.value)
    return said


def test_all_ranks_refuse_to_save_what_is_not_finite_on_one(tmp_path: Path) -> None:
    first, second = on_ranks("tests.distributed.test_checkpoints:refused_to_save", tmp_path)
    for kind in STRATEGIES:
        assert first[kind].startswith("a weight on another process is not finite at optimiser step 2")
        assert second[kind].startswith("model.")
        assert not (tmp_path / f"{kind}.ckpt").exists()
