"""GRPO: the clipped objective with its penalty, and the group advantage."""

import pytest
import torch

from latentreward.alignment import ClippedPolicyLoss, GroupAdvantage, gaussian_step_kl, group_advantages
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_close


@pytest.mark.parametrize("case", cases("lpo/10"), ids=lambda case: case.name)
def test_loss(case: Case) -> None:
    data = case.tensors()
    for variant in case.options["variants"]:
        key = variant["name"]
        log_prob, mean = (data[f"{key}.{name}"].clone().requires_grad_() for name in ("log_prob", "prev_mean"))
        loss = ClippedPolicyLoss(variant["clip_range"], variant["beta"], variant["adv_clip_max"])
        kl = gaussian_step_kl(mean, data[f"{key}.prev_mean_ref"], data[f"{key}.std_dev_t"].flatten())
        result = loss(log_prob, data[f"{key}.log_prob_old"], data[f"{key}.advantages"], kl)
        result.loss.backward()
        assert_close((log_prob - data[f"{key}.log_prob_old"]).exp(), data[f"{key}.ratio"], f"{key}.ratio")
        assert_close(result.policy, data[f"{key}.policy_loss"], f"{key}.policy_loss")
        assert_close(result.loss, data[f"{key}.loss"], f"{key}.loss")
        assert_close(log_prob.grad, data[f"{key}.grad_log_prob"], f"{key}.grad_log_prob")
        if loss.needs_reference:
            assert_close(result.kl, data[f"{key}.kl_loss"], f"{key}.kl_loss")
            assert_close(mean.grad, data[f"{key}.grad_prev_mean"], f"{key}.grad_prev_mean")
        else:
            assert f"{key}.kl_loss" not in data
            assert mean.grad is None


@pytest.mark.parametrize("case", cases("lpo/10"), ids=lambda case: case.name)
def test_advantages(case: Case) -> None:
    epsilon = case.options["std_eps"]
    for path in (path for path in case.files if path.suffix == ".npz"):
        data = Tensors(path)
        rewards, groups = data["rewards"], data["prompt_index"]
        for global_std in (True, False):
            name = f"advantages_global_std_{global_std}"
            rule = GroupAdvantage("all" if global_std else "group", epsilon=epsilon)
            assert_close(rule(rewards, groups), data[name], name)
        for prompt in groups.unique():
            rows = groups == prompt
            expected = data["advantages_global_std_False"][rows]
            assert_close(group_advantages(rewards[rows], epsilon), expected, "rows are candidates, columns states")
        everything = torch.zeros(rewards.numel(), dtype=torch.int64)
        advantages = GroupAdvantage(epsilon=epsilon)(rewards.flatten(), everything).view_as(rewards)
        assert_close(advantages, data["advantages_no_tracking"], "advantages_no_tracking")
