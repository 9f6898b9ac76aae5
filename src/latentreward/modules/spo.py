"""SPO: LPO's predecessor, with a reward that sees decoded pictures."""

from typing import Any

from latentreward.modules.lpo import LPOModule
from latentreward.policies import PolicySource
from latentreward.rewards import RewardSource
from latentreward.rollout import Branching, FixedThreshold, PairSelection


class SPOModule(LPOModule):
    """Step-aware Preference Optimisation (arXiv:2406.04314).

    :class:`LPOModule` with SPO's settings: one threshold of 0.3 for all steps, candidates from timestep 750 on (of 20
    DDIM steps the first four draw one state), scored at the timestep at which they lie, and β = 10. The reward that
    belongs to it, the step-aware preference model, scores the decoded x̂_0 of each candidate
    (:class:`~latentreward.rewards.PixelReward`).

    Args:
        policy: See :class:`LPOModule`.
        reward: See :class:`LPOModule`.
        selection: None takes SPO's threshold.
        candidates: None takes SPO's window and timestep of scoring.
        beta: β of the loss.
        options: See :class:`LPOModule`.

    Note:
        The paper says t ≤ 750; the step that the released code begins with starts from 751, which is inside here.
    """

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource,
        selection: PairSelection | None = None,
        candidates: Branching | None = None,
        beta: float = 10.0,
        **options: Any,
    ) -> None:
        selection = selection or FixedThreshold(0.3)
        candidates = candidates or Branching(high=751.0, score_at="candidate")
        super().__init__(policy, reward, selection, candidates=candidates, beta=beta, **options)
