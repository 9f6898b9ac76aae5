"""PAVRM's head on any spec: what it reads, its weights at the start, and what it refuses. Numbers: tests/golden."""

from dataclasses import replace

import pytest
import torch

from latentreward.reward import PAVRMHead
from tests.reward.heads.features import DIT_SPEC, random_features


def test_reads_the_last_tap_alone_and_in_any_order() -> None:
    head, given = PAVRMHead(DIT_SPEC), random_features(DIT_SPEC)
    score, last = head(given), given.visual[-1]
    earlier = replace(random_features(DIT_SPEC), visual=(*random_features(DIT_SPEC).visual[:-1], last))
    torch.testing.assert_close(head(earlier), score, rtol=0, atol=0)
    torch.testing.assert_close(head(replace(given, visual=(*given.visual[:-1], last.flip(1)))), score)


@pytest.mark.parametrize("add_query", [True, False])
def test_the_query_is_added_to_what_it_attended_to(add_query: bool) -> None:
    """Of equal tokens, attention returns out(value(token)), whatever its weights."""
    head, given = PAVRMHead(DIT_SPEC, num_queries=2, add_query=add_query), random_features(DIT_SPEC)
    token = given.visual[-1][:, :1]
    attention, width = head.attention, head.queries.shape[1]
    value = token @ attention.in_proj_weight[2 * width :].T + attention.in_proj_bias[2 * width :]
    expected = attention.out_proj(value).squeeze(1) + (head.queries.mean(dim=0) if add_query else 0)
    torch.testing.assert_close(head.pool(token.expand(-1, 16, -1)), expected)
