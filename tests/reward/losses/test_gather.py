"""Two real processes: gathered losses and their averaged gradients equal one process with all rows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from latentreward.core.contracts import CrossScores, PairScores, PairTargets
from latentreward.reward import (
    BradleyTerryLoss,
    LRMLoss,
    PreferenceLoss,
    ThurstoneLoss,
    gather_pair_scores,
    gather_with_grad,
)
from tests.reward.losses.pairs import random_scores
from tests.reward.losses.two_ranks import on_ranks

ROWS = 6
LOSSES: dict[str, PreferenceLoss] = {
    "thurstone": ThurstoneLoss(),
    "nll": ThurstoneLoss("nll"),
    "bradley_terry": BradleyTerryLoss(1.0),
    "lrm_pair": LRMLoss("pair"),
    "lrm_both": LRMLoss("both", 0.5, 0.25),
}


class TwoTowers(nn.Module):
    """A reward with a parameter before the features are gathered and one after."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Linear(4, 3, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor, text: Tensor, columns: PairScores, loss: PreferenceLoss) -> Tensor:
        chosen, rejected = normalize(self.image(images), dim=-1)
        if loss.needs_cross_scores:
            text, chosen, rejected = (gather_with_grad(x) for x in (text, chosen, rejected))
            cross = CrossScores(*(self.logit_scale.exp() * text @ image.T for image in (chosen, rejected)))
            rest = gather_pair_scores(columns)
            return loss(replace(rest, chosen=cross.chosen.diagonal(), rejected=cross.rejected.diagonal(), cross=cross))
        rewards = (self.logit_scale.exp() * (text * image).sum(dim=-1) for image in (chosen, rejected))
        return loss(gather_pair_scores(replace(columns, **dict(zip(("chosen", "rejected"), rewards, strict=True)))))


def rows_of(rank: int | None, shares: tuple[int, int]) -> slice:
    return slice(None) if rank is None else (slice(0, shares[0]) if rank == 0 else slice(shares[0], ROWS))


def loss_and_gradients(name: str, rank: int | None, shares: tuple[int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, ROWS, 4, generator=generator)
    text = normalize(torch.randn(ROWS, 3, generator=generator), dim=-1)
    rows, columns = rows_of(rank, shares), random_scores(2, ROWS)
    names = ("chosen", "rejected", "label", "weight", "chosen_sigmas", "rejected_sigmas")
    columns = replace(columns, **{field: getattr(columns, field)[rows] for field in names})
    model = TwoTowers()
    loss = model(images[:, rows], text[rows], columns, LOSSES[name])
    loss.backward()
    return {"loss": loss.detach(), "image": model.image.weight.grad, "logit_scale": model.logit_scale.grad}


def all_losses(rank: int, _: str) -> dict[str, dict[str, Tensor]]:
    return {
        f"{name} {shares}": loss_and_gradients(name, rank, shares) for name in LOSSES for shares in ((3, 3), (2, 4))
    }


@pytest.mark.slow
def test_averaged_gradients_equal_one_process(tmp_path: Path) -> None:
    ranks = on_ranks("tests.reward.losses.test_gather:all_losses", "", tmp_path)
    for key in ranks[0]:
        alone = loss_and_gradients(key.split()[0], None, (0, 0))
        for rank in ranks:
            torch.testing.assert_close(rank[key]["loss"], alone["loss"], rtol=1e-6, atol=0, msg=key)
        for parameter in ("image", "logit_scale"):
            mean = (ranks[0][key][parameter] + ranks[1][key][parameter]) / 2
            torch.testing.assert_close(mean, alone[parameter], rtol=1e-5, atol=1e-7, msg=f"{key} {parameter}")


def gather_columns(rank: int, _: str) -> dict[str, Tensor]:
    columns = with_targets(random_scores(4, 3 + rank, out_dim=2))
    gathered = gather_pair_scores(columns)
    given = {name: getattr(gathered.targets, name) for name in ("chosen_std", "rejected_std")}
    return given | {
        name: getattr(gathered, name) for name in ("chosen", "rejected", "label", "weight", "rejected_sigmas")
    }


def with_targets(scores: PairScores) -> PairScores:
    """With the rewards as values, and their squares as uncertainties."""
    squares = scores.chosen**2, scores.rejected**2
    return replace(scores, targets=PairTargets(scores.chosen, scores.rejected, *squares))


@pytest.mark.slow
def test_uneven_ranks_with_several_outputs_keep_rank_order(tmp_path: Path) -> None:
    expected = [with_targets(random_scores(4, 3 + rank, out_dim=2)) for rank in range(2)]
    for gathered in on_ranks("tests.reward.losses.test_gather:gather_columns", "", tmp_path):
        for name, value in gathered.items():
            parts = [part.targets if name.endswith("_std") else part for part in expected]
            assert torch.equal(value, torch.cat([getattr(part, name) for part in parts]))


@pytest.mark.parametrize("function", [gather_with_grad, gather_pair_scores])
def test_one_process_gets_its_own_back(function: Callable) -> None:
    own = random_scores(5) if function is gather_pair_scores else torch.ones(3)
    assert function(own) is own
