"""DiNa-LRM's losses: exact values, and the released forms where they are exact.

The library is held to Bradley–Terry in full, to the epsilon-free ``exact64`` values, and to the released Thurstone
losses of single pairs with z > -3. The released means, gradients and tails carry the epsilon's error; the oracle
repeats it, which shows that the file and the formulas are understood.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from latentreward.core.contracts import PairScores
from latentreward.reward import (
    BradleyTerryLoss,
    ConstantVarianceThurstoneLoss,
    PreferenceLoss,
    ThurstoneLoss,
    comparison_std,
    log_ndtr,
    mixture_fidelity,
    thurstone_nll,
)
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_close
from tests.oracles import released_thurstone as released

RELEASED_CONSTANTS = {
    "scale": 2.0,
    "min_var": 0.05,
    "constant_var": 0.5,
    "bt_margin": 1.0,
    "paper_k": 2.0,
    "paper_sigma_u": 0.1,
}
EXACT = {"rtol": 1e-5, "atol": 1e-7}
RELEASED = {"rtol": 1e-5, "atol": 5e-5}
"""At z = -3 one unit in the last place of float32's erf moves log p by 4e-5."""
Z_OF_TAIL = -3.0
every_case = pytest.mark.parametrize("case", cases("dina/loss", "losses_"), ids=lambda case: case.name)


def constants_of(case: Case) -> dict[str, float]:
    return RELEASED_CONSTANTS | case.options.get("constants", {})


def library_losses(constants: dict[str, float]) -> dict[str, PreferenceLoss]:
    code = {"k": constants["scale"], "sigma_u": constants["min_var"] ** 0.5}
    paper = {"k": constants["paper_k"], "sigma_u": constants["paper_sigma_u"]}
    return {
        "thurstone": ThurstoneLoss(**code),
        "thurstone-constant": ConstantVarianceThurstoneLoss(constants["constant_var"]),
        "nll_code": ThurstoneLoss("nll", **code),
        "nll_paper": ThurstoneLoss("nll", **paper),
        "fid_code": ThurstoneLoss(**code),
        "fid_paper": ThurstoneLoss(**paper),
        "bt": BradleyTerryLoss(),
        "bt-margin": BradleyTerryLoss(constants["bt_margin"]),
    }


def oracle_losses(constants: dict[str, float], sigma: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    code = constants["scale"] * sigma**2 + constants["min_var"]
    paper = constants["paper_k"] * sigma**2 + constants["paper_sigma_u"] ** 2
    return {
        "thurstone": lambda d: released.fidelity(d, code),
        "thurstone-constant": lambda d: released.fidelity(d, constants["constant_var"]),
        "nll_code": lambda d: released.nll(d.float(), code),
        "nll_paper": lambda d: released.nll(d.float(), paper),
        "fid_code": lambda d: released.fidelity(d.float(), code),
        "fid_paper": lambda d: released.fidelity(d.float(), paper),
        "bt": released.bradley_terry,
        "bt-margin": lambda d: released.bradley_terry(d, constants["bt_margin"]),
    }


def scores_of(data: Tensors) -> PairScores:
    """Certain pairs whose rewards are leaves of a graph."""
    chosen, rejected = (data[f"in.score_{side}"].clone().requires_grad_() for side in ("chosen", "reject"))
    sigma, ones = data["in.sigma"], torch.ones(len(chosen))
    return PairScores(chosen, rejected, ones, ones, sigma, sigma)


def kinds_in(data: Tensors) -> list[str]:
    return sorted({name.split(".")[0] for name in data} - {"in", "exact64"})


@every_case
def test_sigmas_are_levels_of_the_shifted_schedule(case: Case) -> None:
    data = case.tensors()
    if "in.u" in data:
        j = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
        levels = 3 * j / (1 + 2 * j)
        nearest = levels[(levels - data["in.u"].double()[:, None]).abs().argmin(dim=1)]
        assert_close(nearest, data["in.sigma"], "in.sigma")


def z_of(scores: PairScores, loss: ThurstoneLoss) -> Tensor:
    """Margins in units of the comparison's standard deviation, ``(n, out_dim)``."""
    std = comparison_std(scores.chosen_sigmas, scores.rejected_sigmas, loss.k, loss.sigma_u)
    return scores.margin.detach().double() / std[:, None]


def released_error(kind: str, scores: PairScores, loss: ThurstoneLoss) -> Tensor:
    """What the released form's epsilons add to the exact loss, ``(n,)`` in float64: up to 1e-3 near z = -3."""
    z = z_of(scores, loss)
    std = comparison_std(scores.chosen_sigmas, scores.rejected_sigmas, loss.k, loss.sigma_u).double()[:, None]
    form = released.nll if kind.startswith("nll") else released.fidelity
    exact = -torch.special.log_ndtr(z) if kind.startswith("nll") else 1 - torch.special.ndtr(z).sqrt()
    return (form(z * std, std**2 / 2) - exact).mean(dim=1)


@every_case
def test_exact_values(case: Case) -> None:
    data, losses, scores = case.tensors(), library_losses(constants_of(case)), scores_of(case.tensors())
    certain = torch.tensor(1.0)
    for name in data.below("exact64."):
        source, quantity = name.split(".")
        golden = data[f"exact64.{name}"]
        z = z_of(scores, losses[f"nll_{source}"]).reshape(golden.shape)
        exact = {
            "z": lambda z: z,
            "log_p": lambda z: log_ndtr(z.double()),
            "fidelity": lambda z: mixture_fidelity(z, certain),
            "nll": lambda z: thurstone_nll(z, certain),
        }
        assert_close(exact[quantity](z), golden, name, **EXACT)
        loss = losses.get({"fidelity": f"fid_{source}", "nll": f"nll_{source}"}.get(quantity))
        if loss is not None:
            assert_close(loss.per_pair(scores), golden.reshape(len(z), -1).mean(dim=1), f"{name} by pairs", **EXACT)


@every_case
def test_bradley_terry_in_full(case: Case) -> None:
    data, losses = case.tensors(), library_losses(constants_of(case))
    for kind in kinds_in(data):
        if kind.startswith("bt"):
            compare_in_full(data, kind, losses[kind])


def compare_in_full(data: Tensors, kind: str, loss: PreferenceLoss) -> None:
    scores = scores_of(data)
    per_pair = loss.per_pair(scores)
    per_pair.sum().backward()
    alone = scores.chosen.grad.clone()
    scores = scores_of(data)
    mean = loss(scores)
    mean.backward()
    found = {
        "loss_mean": mean,
        "loss_per_pair": per_pair,
        "grad_chosen_per_pair": alone,
        "grad_chosen_of_mean": scores.chosen.grad,
        "grad_reject_of_mean": scores.rejected.grad,
    }
    for quantity in data.below(f"{kind}."):
        golden = data[f"{kind}.{quantity}"]
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if golden.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        assert_close(found[quantity].reshape(golden.shape), golden, f"{kind}.{quantity}", **tolerance)


@every_case
def test_thurstone_where_the_released_form_is_exact(case: Case) -> None:
    data, constants = case.tensors(), constants_of(case)
    scores, losses = scores_of(data), library_losses(constants)
    for kind in kinds_in(data):
        if kind.startswith("bt") or f"{kind}.loss_per_pair" not in data:
            continue
        loss, golden = losses[kind], data[f"{kind}.loss_per_pair"]
        body = (z_of(scores, loss) > Z_OF_TAIL).all(dim=1)
        rounded = data["in.score_chosen"].dtype == torch.bfloat16 and kind.startswith("thurstone")
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if rounded else RELEASED
        expected = golden - released_error(kind, scores, loss)
        assert_close(loss.per_pair(scores)[body], expected[body], kind, **tolerance)


@every_case
def test_several_outputs_average_their_columns(case: Case) -> None:
    data, constants = case.tensors(), constants_of(case)
    scores = scores_of(data)
    if scores.chosen.shape[1] == 1:
        return
    losses = library_losses(constants)
    for kind in kinds_in(data):
        loss = losses[kind]
        if isinstance(loss, ThurstoneLoss) and z_of(scores, loss).min() <= Z_OF_TAIL:
            continue  # a mean that contains the released form's tail
        golden = data[f"{kind}.loss_mean"]
        if isinstance(loss, ThurstoneLoss):
            golden = golden - released_error(kind, scores, loss).mean()
        assert_close(loss(scores), golden, kind, **RELEASED)


@every_case
def test_released_forms_are_understood(case: Case) -> None:
    data, constants = case.tensors(), constants_of(case)
    sigma = data["in.sigma"].reshape(-1, 1)
    for kind in kinds_in(data):
        oracle = oracle_losses(constants, sigma)[kind]
        margin = (data["in.score_chosen"] - data["in.score_reject"]).requires_grad_()
        if margin.dtype == torch.bfloat16 and kind.startswith(("nll", "fid")):
            margin = (data["in.score_chosen"].float() - data["in.score_reject"].float()).requires_grad_()
        per_pair = oracle(margin).mean(dim=1)
        alone = torch.autograd.grad(per_pair.sum(), margin, retain_graph=True)[0]
        of_mean = torch.autograd.grad(per_pair.mean(), margin)[0]
        found = {
            "loss_mean": per_pair.mean(),
            "loss_per_pair": per_pair,
            "grad_chosen_per_pair": alone,
            "grad_chosen_of_mean": of_mean,
            "grad_reject_of_mean": -of_mean,
        }
        rounded = data["in.score_chosen"].dtype == torch.bfloat16
        for quantity in data.below(f"{kind}."):
            tolerance = {"rtol": 2e-2, "atol": 2e-2} if rounded else {"rtol": 1e-5, "atol": 1e-6}
            golden = data[f"{kind}.{quantity}"]
            assert_close(found[quantity].reshape(golden.shape), golden, f"{kind}.{quantity}", **tolerance)
