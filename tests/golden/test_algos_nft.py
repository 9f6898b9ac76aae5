"""DiffusionNFT: its loss with gradients, the schedule of the old policy, and its advantages."""

import pytest
import torch
from latentreward.callbacks import TrainableEMA

from latentreward.alignment import GroupAdvantage, NFTLoss
from latentreward.alignment.losses.nft import optimality, self_normaliser
from latentreward.alignment.policies.moving_average import DecayRamp, move_towards
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_within

every_loss = pytest.mark.parametrize("case", cases("algos/nft_loss"), ids=lambda case: case.name)
every_schedule = pytest.mark.parametrize("case", cases("algos/nft_schedule"), ids=lambda case: case.name)
SCHEDULES = {"0": DecayRamp(most=0.0), "1": DecayRamp(), "2": DecayRamp(0.0075, 0.999, 75)}


@every_loss
def test_loss(case: Case) -> None:
    data = case.tensors()
    for variant, options in case.options["variants"].items():
        check_variant(data, f"{variant}.", options)


def check_variant(data: Tensors, variant: str, options: dict) -> None:
    clean, noise, levels = (data[variant + name] for name in ("x0", "noise", "t"))
    old, reference = data[variant + "v_old"], data[variant + "v_ref"]
    velocity = data[variant + "v"].clone().requires_grad_()
    loss = NFTLoss(options["beta"], options["kl_coef"], options["adv_clip_max"], options["adv_mode"])
    result = loss(velocity, old, noise - clean, levels, data[variant + "advantages"], reference)
    column = levels.view(-1, *[1] * (clean.ndim - 1))
    mixed = {
        "positive": options["beta"] * velocity.detach() + (1 - options["beta"]) * old,
        "negative": (1 + options["beta"]) * old - options["beta"] * velocity.detach(),
    }
    found = {
        "xt": (1 - column) * clean + column * noise,
        "r": optimality(data[variant + "advantages"], options["adv_clip_max"], options["adv_mode"]),
        "loss": result.loss,
        "policy_loss": result.policy,
        "kl_loss": result.kl,
        "positive_loss": result.positive,
        "negative_loss": result.negative,
        "grad_v": torch.autograd.grad(result.loss, velocity)[0],
    }
    for side, value in mixed.items():
        error = column.double() * ((noise - clean).double() - value.double())
        found[f"weight_{side}"] = self_normaliser(error.flatten(1))
    for name, value in found.items():
        assert_within(value, data[variant + name], variant + name, 2e-5)


@every_schedule
def test_decay_of_the_old_policy(case: Case) -> None:
    for kind, decays in case.options["old_policy_decay"].items():
        for step, decay in decays.items():
            assert SCHEDULES[kind].decay(int(step)) == pytest.approx(decay, rel=1e-12, abs=1e-15)


@every_schedule
def test_old_policy_and_average(case: Case) -> None:
    data, steps = case.tensors(), case.options["old_update_global_steps"]
    module = torch.nn.ParameterList(torch.nn.Parameter(data[f"old.init{number}"].clone()) for number in range(2))
    old = [weight.detach().clone() for weight in module]
    ema = TrainableEMA(0.9)
    ema.average = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    trainer = type("Steps", (), {"global_step": 0})()
    for index, step in enumerate(steps):
        for number, weight in enumerate(module):
            weight.data.copy_(data[f"old.step{index}.param{number}"])
        trainer.global_step += 1
        ema.on_train_batch_end(trainer, module)
        for number, weight in enumerate(module):
            move_towards(old[number], weight.detach(), SCHEDULES["2"].decay(step))
            assert_within(old[number], data[f"old.step{index}.old{number}"], f"old{number} after {step}", 1e-6)
            assert_within(ema.average[str(number)], data[f"old.step{index}.ema{number}"], f"ema{number}", 1e-6)


@every_schedule
def test_advantages(case: Case) -> None:
    data, prompts = case.tensors(), case.options["prompts"]
    groups = torch.tensor([prompts.index(prompt) for prompt in prompts])
    for everywhere in (True, False):
        found = GroupAdvantage("all" if everywhere else "group")(data["advantage.rewards"], groups)
        assert_within(found, data[f"advantage.global_std_{everywhere}"], f"advantage, {everywhere}", 1e-6)
