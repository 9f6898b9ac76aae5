"""LatSearch: the starts of a population, its weights, and the members that go on."""

import pytest
import torch

from latentreward.apps.generation.search import Population, survivors
from tests.golden.catalogue import Case, cases
from tests.golden.closeness import assert_within

every_case = pytest.mark.parametrize("case", cases("algos/latsearch"), ids=lambda case: case.name)


def settings_of(case: Case) -> Population:
    told = case.options["settings"]
    return Population(told["particles"], told["noise_perturbation"], told["search_schedule"], told["temperature"])


@every_case
def test_starts(case: Case) -> None:
    data = case.tensors()
    found = settings_of(case).starts(data["init.parent"], data["init.epsilons"][None])
    assert_within(found[0], data["init.latents"], "init.latents", 1e-6)


@every_case
def test_members_that_go_on(case: Case) -> None:
    data, population = case.tensors(), settings_of(case)
    cumulative = torch.zeros(population.size)
    for step in population.after_steps:
        prefix = f"search{step}."
        weights = population.weights(data[prefix + "scores"])
        assert_within(weights, data[prefix + "weights"], prefix + "weights", 1e-6)
        kept, cumulative = survivors(weights, cumulative, data[prefix + "drawn"])
        assert_within(cumulative, data[prefix + "cumulative"], prefix + "cumulative", 1e-6)
        if step == population.after_steps[-1]:
            kept = kept[cumulative.argmax()][None]
        assert_within(data[prefix + "latents_before"][kept], data[prefix + "latents_after"], prefix + "latents", 1e-6)
