"""The policy, the text-to-image model that alignment trains: loading, adapters and predictions."""

from latentreward.policies.checkpoint import load_policy
from latentreward.policies.loading import PolicySource
from latentreward.policies.policy import POLICY, AdapterSwitch, Policy
from latentreward.policies.surrogate_gradient import surrogate

__all__ = ["POLICY", "AdapterSwitch", "Policy", "PolicySource", "load_policy", "surrogate"]
