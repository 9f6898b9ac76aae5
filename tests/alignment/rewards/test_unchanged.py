"""The change of what an edit should leave alone."""

import pytest
import torch

from latentreward.alignment.rewards.callable import unchanged_region_change
from latentreward.core.errors import InputError

SOURCES = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))


def test_an_edit_of_less_than_the_rest_changes_nothing() -> None:
    edited = SOURCES.clone()
    edited[:, :, :, :4] += 5.0
    assert unchanged_region_change(edited, SOURCES).allclose(torch.full((2,), 1e-6))
    assert unchanged_region_change(edited, SOURCES, 0.75).allclose(torch.full((2,), 5 * (1 / 3) ** 0.5))
    assert unchanged_region_change(edited, SOURCES, 1.0).allclose(torch.full((2,), 5 * 0.5**0.5))


def test_a_change_of_every_place_counts() -> None:
    shifted = SOURCES + torch.tensor([0.5, -2.0]).view(2, 1, 1, 1)
    assert unchanged_region_change(shifted, SOURCES, 0.3).allclose(torch.tensor([0.5, 2.0]))


def test_the_gradient_leads_back_to_the_source_where_least_has_changed() -> None:
    edited = SOURCES.double().requires_grad_()
    moved = edited + torch.linspace(0.1, 1, 8).double()
    unchanged_region_change(moved, SOURCES).sum().backward()
    assert edited.grad is not None and (edited.grad[..., :4] > 0).all() and (edited.grad[..., 4:] == 0).all()
    still = SOURCES.clone().requires_grad_()
    unchanged_region_change(still, SOURCES).sum().backward()
    assert still.grad is not None and (still.grad == 0).all()


def test_sizes_must_agree() -> None:
    with pytest.raises(InputError, match=r"\(4, 6, 8\) and those of their source \(4, 6, 4\) differ in size"):
        unchanged_region_change(SOURCES, SOURCES[..., :4])
