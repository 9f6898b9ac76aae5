"""Two advantages: separately clipped, with the KL term once."""

import pytest
import torch

from latentreward.alignment import ClippedPolicyLoss, OutcomeProcessLoss


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, generator=generator) for _ in range(4)]


def test_it_is_the_sum_of_two_clipped_terms_and_not_the_term_of_the_sum() -> None:
    log_prob, old, outcome, process = rows()
    both = OutcomeProcessLoss(0.1)(log_prob, old, outcome, process)
    one = ClippedPolicyLoss(0.1)
    torch.testing.assert_close(both.loss, one(log_prob, old, outcome).loss + one(log_prob, old, process).loss)
    assert abs(both.loss - one(log_prob, old, outcome + process).loss) > 0.1


def test_the_divergence_counts_once() -> None:
    log_prob, old, outcome, process = rows()
    kl = torch.full((16,), 2.0, requires_grad=True)
    with_kl = OutcomeProcessLoss(0.1, kl_weight=0.5)(log_prob, old, outcome, process, kl)
    plain = OutcomeProcessLoss(0.1)(log_prob, old, outcome, process)
    torch.testing.assert_close(with_kl.loss - plain.loss, torch.tensor(1.0))
    with_kl.loss.backward()
    torch.testing.assert_close(kl.grad, torch.full((16,), 0.5 / 16))
    with pytest.raises(ValueError, match="needs kl"):
        OutcomeProcessLoss(0.1, kl_weight=0.5)(log_prob, old, outcome, process)
