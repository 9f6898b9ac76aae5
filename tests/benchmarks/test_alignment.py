"""The benchmarks of alignment run, at toy size, and count what is known."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from tests.marks import release_after


@pytest.fixture(scope="module")
def benchmark(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("alignment")


def cells(text: str, first: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {first}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
@pytest.mark.release
def test_passes_compare_equal_losses(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.measure_passes("toy", batch=2, repeats=1)
    row = cells(capsys.readouterr().out, "1 |")
    assert float(row[5]) < 1e-6
    assert float(row[6]) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "network", "down_and_mid"),
    release_after(1, [("sd15", 859.5, 348.7), ("sdxl", 2567.5, 1243.4)]),
)
def test_weights_of_the_real_sizes(benchmark: Any, size: str, network: float, down_and_mid: float) -> None:
    whole, adapter = (benchmark.count_weights(size, share, "meta") for share in (False, True))
    assert whole.network / 1e6 == adapter.network / 1e6 == pytest.approx(network, abs=0.1)
    assert whole.reward / 1e6 == pytest.approx(down_and_mid, abs=7)  # and the head
    assert (adapter.network + adapter.reward) / (3 * adapter.network) <= 0.36
    assert (whole.network + whole.reward) / (3 * whole.network) <= 0.50


@pytest.mark.slow
def test_flops_of_scoring_a_step_of_sd15(benchmark: Any) -> None:
    work = benchmark.count_scoring("sd15")
    pixels = work["decoding"] + work["clip_h"]
    assert (work["prediction"] + pixels) / work["lrm"] == pytest.approx(8.5, abs=0.1)
    assert pixels / work["lrm"] == pytest.approx(5.4, abs=0.1)


@pytest.mark.slow
@pytest.mark.release
def test_scoring_is_timed_at_toy_size(
    benchmark: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = benchmark.CLIP_MODELS["clip_h"]
    small = clip | {"vision_config": clip["vision_config"] | {"hidden_size": 32, "intermediate_size": 32}}
    monkeypatch.setitem(benchmark.CLIP_MODELS, "clip_h", small)
    benchmark.measure_scoring((), "toy", batch=2, repeats=1)
    assert "| reused x̂_0, with CLIP-H |" in capsys.readouterr().out


@pytest.mark.slow
def test_flops_of_dina(benchmark: Any) -> None:
    work = benchmark.count_dina()
    assert work.backbone / 1e12 == pytest.approx(6.63, abs=0.01)
    assert work.head < 0.03 * work.backbone
