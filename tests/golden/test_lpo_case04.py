"""Which candidates become a pair: best, worst, gap, and every threshold of the published code."""

import re

import pytest
import torch

from latentreward.alignment import (
    CandidateStep,
    DDIMSampler,
    FixedThreshold,
    LinearThreshold,
    ScheduledThreshold,
    SigmaThreshold,
    ThresholdSelection,
    VarianceThreshold,
)
from tests.golden.catalogue import Case, cases
from tests.golden.closeness import assert_close

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SCHEDULED = {"sigma": SigmaThreshold, "variance": VarianceThreshold, "linear": LinearThreshold}
ROUNDING = {"rtol": 0.0, "atol": 5e-5}
"""The published tables have four decimals."""
OF_SQUARES = {"rtol": 0.0, "atol": 1e-4}
"""Variances may be squares of rounded standard deviations."""
OF_THRESHOLD = {"rtol": 0.0, "atol": 5e-4}
"""What the rounding of the tables makes of a threshold."""
every_case = pytest.mark.parametrize("case", cases("lpo/04"), ids=lambda case: case.name)


def scheduled(case: Case, model: str, kind: str) -> ScheduledThreshold:
    return SCHEDULED[kind](case.options[model]["threshold_min"], case.options[model]["threshold_max"])


@every_case
def test_thresholds_come_from_the_scheduler(case: Case) -> None:
    data = case.tensors()
    sampler = DDIMSampler(STABLE_DIFFUSION, len(data["timesteps"]))
    assert_close(sampler.timesteps, data["timesteps"], "timesteps")
    assert_close(sampler.noise_std.flip(0), data["sigma_table_by_index"], "sigma table", **ROUNDING)
    assert_close((sampler.noise_std**2).flip(0), data["variance_table_by_index"], "variance table", **OF_SQUARES)
    for name in data.below("threshold_"):
        model, kind = name.split("_")
        selection = scheduled(case, model, kind)
        found = torch.tensor([selection.threshold(index, sampler) for index in range(len(sampler))])
        assert_close(found, data[f"threshold_{name}"], name, **OF_THRESHOLD)


@every_case
def test_selected_pairs(case: Case) -> None:
    data = case.tensors()
    sampler = DDIMSampler(STABLE_DIFFUSION, len(data["timesteps"]))
    for group in case.options["groups"]:
        prefix = group["prefix"]
        scores, timesteps = data[f"{prefix}.scores"], data[f"{prefix}.timesteps"]
        half = scores.dtype == torch.float16
        for mode in {name.split(".kept")[0] for name in data.below(f"{prefix}.") if name.endswith(".kept")}:
            fixed = re.fullmatch(r"fixed(.+)", mode)
            selection: ThresholdSelection = (
                FixedThreshold(float(fixed[1])) if fixed else scheduled(case, *mode.split("_"))
            )
            for row, timestep in enumerate(timesteps.tolist()):
                index, nothing = sampler.step_index(torch.tensor([timestep])).item(), torch.zeros(1, 1)
                column = scores[:, row : row + 1]
                step = CandidateStep(index, timestep, nothing, nothing.expand(len(column), 1, 1), column, column)
                selected, name = selection.select(step, sampler), f"{prefix}.{mode} row {row}"
                assert selected.winner.tolist() == [data[f"{prefix}.win_index"][row].item()], name
                assert selected.loser.tolist() == [data[f"{prefix}.lose_index"][row].item()], name
                tolerance = {"rtol": 2e-3, "atol": 2e-3} if half else {"rtol": 1e-5, "atol": 1e-6}
                assert_close(selected.gap[0], data[f"{prefix}.prob_diff"][row], name, **tolerance)
                assert selected.kept.tolist() == [data[f"{prefix}.{mode}.kept"][row].item()], name
