"""FSDP2 of an alignment run: the policy, and what belongs to its reward alone.

In a policy each of the remaining modules is a group of its own, because rollouts, callbacks and rewards that share the
network call its parts at any time.
"""

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from latentreward.alignment.policies.policy import Policy
from latentreward.alignment.rewards.base import Reward
from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.reward.modules.sharding import called_equally, check_axes, shard_encoders


def shard_policy(policy: Policy, mesh: DeviceMesh) -> None:
    """Apply ``fully_shard`` to a policy, in place; a second call changes nothing.

    Afterwards network, text encoder and VAE can be called separately; parts of the network can too, once the whole
    network has been called. All ranks must hold the same weights and call each equally often.
    """
    if isinstance(policy.network, FSDPModule):
        return
    check_axes(policy)
    blocks = [*policy.blocks()]
    inside = {module for block in blocks for module in block.modules()}
    rest = [part for part in called_parts(policy.network) if not inside.intersection(part.modules())]
    for group in [*blocks, *rest]:
        if any(True for _ in group.parameters()):
            fully_shard(group, mesh=mesh)
    fully_shard(policy.network, mesh=mesh, reshard_after_forward=True)
    shard_encoders(policy.text_encoder, called_equally(policy), mesh)


def called_parts(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the children of a network; of a list or dict of modules, which is not called itself, its members."""
    for child in network.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from called_parts(child)
        else:
            yield child


def shard_reward(reward: Reward, mesh: DeviceMesh) -> None:
    """Shard the large modules that belong to a reward and not to the policy: blocks of networks, and text encoders.

    The reward's other modules are frozen, and stay whole on every rank.
    """
    own = set(reward.modules())
    for scorer in [part for part in own if isinstance(part, LatentScorer)]:
        backbone = scorer.model.backbone
        for block in backbone.blocks():
            if block in own:  # called by itself, it would stay whole without reshard_after_forward
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
        shard_encoders(backbone.text_encoder if backbone.text_encoder in own else None, None, mesh)
