"""Bounds of a step on a card: counts of operators, seconds of each limit, and the setting that would help most."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from torch.utils._python_dispatch import TorchDispatchMode

from latentreward.apps.cli import main
from latentreward.apps.estimate.estimate import Estimate, limits_text
from latentreward.apps.estimate.step_costs import TEXT, PartCosts, StepCosts
from latentreward.core.peak_rates import LAUNCH, Limits, Work, find_limits, work_of
from tests.apps.estimate.test_estimate import CONFIGS

CARD = Limits("a card, bf16-mixed", tflops=2.0, bandwidth=0.5)
TERA = 10**12


class Counted(TorchDispatchMode):
    """Mode that counts the work of real operators."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.work += work_of(func, args, kwargs or {}, result)
        return result


def test_work_of_operators() -> None:
    first, second = torch.ones(3, 4), torch.ones(4, 5, dtype=torch.float64)
    with Counted() as counted:
        product = first @ second.float()
        product.add_(1.0)
        product.T[1:].detach().flatten()[0].item()
        torch.empty(7)
    convert, multiply, add = 20 * (8 + 4), (12 + 20 + 15) * 4, 2 * 15 * 4
    copy = 2 * 12 * 4  # `flatten` of a transposed tensor
    assert counted.work == Work(2 * 3 * 4 * 5, convert + multiply + add + copy, 4)


def test_seconds_of_each_limit() -> None:
    work = Work(flops=4 * TERA, bytes=3 * TERA, kernels=1000)
    assert CARD.bounds(work) == {"arithmetic": 2.0, "traffic": 6.0, "launches": 1000 * LAUNCH}


def test_peaks_by_precision() -> None:
    assert find_limits("H200", None) == ("H200, 32-true", 66.9, 4.8)


@pytest.mark.parametrize(
    ("card", "half", "bandwidth"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, 1.555),
        ("NVIDIA A100-SXM4-80GB", 312, 2.039),
        ("NVIDIA H100 80GB HBM3", 989.4, 3.35),
        ("NVIDIA H100 PCIe", 756, 2.0),
        ("NVIDIA H200", 989.4, 4.8),
        ("NVIDIA L40S", 362, 0.864),
        ("NVIDIA GeForce RTX 4090", 165.2, 1.008),
        ("AMD Instinct MI300X OAM", 1307.4, 5.3),
        ("h100", 989.4, 3.35),
    ],
)
def test_peaks_by_the_name_of_a_card(card: str, half: float, bandwidth: float) -> None:
    assert find_limits(card, "bf16-mixed") == (f"{card}, bf16-mixed", half, bandwidth)


@pytest.mark.parametrize(
    "card",
    [
        "NVIDIA L40",
        "NVIDIA A10G",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "Tesla T4",
    ],
)
def test_other_cards_have_no_peak(card: str) -> None:
    assert find_limits(card, "bf16-mixed") is None


def found(work: Mapping[str, Work], data: str, trained: int = 0, **performance: Any) -> Estimate:
    """An estimate of so much work."""
    costs = StepCosts((PartCosts(TEXT, 9, trained, 9),), 0, "AdamW", 0, 0, 0, 0, 0, 0, 0, 0, work=work)
    trainer = Namespace(accumulate_grad_batches=2, max_steps=-1)
    switches = Namespace(**{"auto": True, "compile_blocks": None, **performance})
    settings = Namespace(data=Namespace(class_path=data), trainer=trainer, performance=switches)
    return Estimate(costs, settings, ())


PIXELS, CACHED = "latentreward.data.PreferenceDataModule", "latentreward.diffusion.CachedPreferenceDataModule"
PROMPTS = "latentreward.data.PromptDataModule"
MOVING, COUNTING = Work(bytes=TERA), Work(flops=TERA)
STEP = {"encode": MOVING, "forward": MOVING, "backward": COUNTING, "recompute": COUNTING, "optimizer": MOVING}


@pytest.mark.parametrize(
    ("data", "trained", "said", "gain"),
    [
        (PIXELS, 9, "cached latents", 4.0),
        (CACHED, 0, "--data.cached_text=true", 4.0),
        (PROMPTS, 0, "EncodeOnce", 4.0),
        (CACHED, 9, "", 0.0),  # arithmetic is no limit
    ],
)
def test_the_encoders_that_a_step_could_do_without(data: str, trained: int, said: str, gain: float) -> None:
    text = limits_text(found(STEP, data, trained), CARD)
    assert "limit: traffic, at least 10 s a step" in text
    assert (f"; what would help most: {said}" in text and f"({gain:.2g} s less)" in text) == bool(said)


@pytest.mark.slow
def test_an_estimate_for_a_named_card(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = (f"--config={CONFIGS}/model/dina_lrm_tiny.yaml", f"--config={CONFIGS}/data/tinyworld_pickapic.yaml")
    options = ("--data.root=nowhere", "--data.batch_size=8", "--trainer.gradient_clip_val=1.0")
    main(["fit", *tiny, *options, "--trainer.callbacks+=TrainableEMA", "--estimate", "--card=H100"])
    text = capsys.readouterr().out
    for row in ("  encode", "  forward", "  backward", "  optimizer", "  ema", "a step"):
        assert re.search(rf"^{row} +[\de.-]+ +[\de.-]+ +[1-9]\d* ", text, re.M), row
    assert "limit: launches, at least" in text
    for more, said in (
        (["--card=H100"], "card: H100 is for --estimate; add it, or leave card out"),
        (["--card=H2O", "--estimate"], "card: 'H2O' is not known; give one of A100 80GB PCIe, A100, H100 PCIe"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["fit", *tiny, *more])
        assert said in capsys.readouterr().err
