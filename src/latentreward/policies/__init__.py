"""The policy, the text-to-image model that alignment trains: loading, adapters and predictions."""

from latentreward.policies.adapters import AdapterSwitch
from latentreward.policies.checkpoint import load_policy
from latentreward.policies.loading import PolicySource
from latentreward.policies.policy import POLICY, Policy
from latentreward.policies.surrogate_gradient import surrogate

UNetPolicy = DiTPolicy = Policy
"""Names that earlier releases exported, when each network had a policy class of its own.

They stay for code that imports them. No config or checkpoint names a policy's class.
"""

__all__ = ["POLICY", "AdapterSwitch", "Policy", "PolicySource", "load_policy", "surrogate"]
