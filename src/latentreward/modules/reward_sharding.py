"""FSDP2 sharding of rewards in alignment."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from latentreward.modules.sharding import shard_encoders
from latentreward.rewards.base import Reward
from latentreward.rewards.latent import LatentScorer


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
