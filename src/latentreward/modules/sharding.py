"""FSDP2: each rank keeps a share of every weight, and whole ones only of the block that is at work.

Groups that are gathered together: each block of the network; each layer of the text encoder, and its rest; the VAE;
and what remains (embeddings, norms, head, temperature), which is whole for the length of a step. Frozen weights are
sharded like the others; a group may hold frozen bfloat16 beside float32 that trains, because FSDP2 asks for one dtype
among those that train only.
"""

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from latentreward.backbones.base import DiffusionBackbone
from latentreward.errors import InputError

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
"""What Lightning calls where PyTorch would call ``forward``."""


def shard(module: nn.Module, backbone: DiffusionBackbone, mesh: DeviceMesh) -> None:
    """Apply ``fully_shard`` to a reward module, in place; a second call changes nothing.

    The module was built whole, so each process needs host memory for all of it once.

    Args:
        module: On any device; all ranks must hold the same weights.
        backbone: The part of it whose blocks are groups of their own.
        mesh: One axis, over which weights are shared out.

    Raises:
        InputError: If a parameter has no axis to cut.
    """
    if isinstance(module, FSDPModule):
        return
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0:
            raise InputError(f"parameter {name} is a scalar, which FSDP2 cannot share out; give it the shape (1,)")
    for block in backbone.blocks():
        fully_shard(block, mesh=mesh)
    if backbone.text_encoder is not None:
        for layer in repeated_layers(backbone.text_encoder):
            fully_shard(layer, mesh=mesh)
        # Not its towers: fully_shard changes a module's class, by which transformers finds what to record.
        fully_shard(backbone.text_encoder, mesh=mesh)
    if backbone.vae is not None:
        fully_shard(backbone.vae, mesh=mesh)
        register_fsdp_forward_method(backbone.vae, "encode")
        register_fsdp_forward_method(backbone.vae, "decode")
    fully_shard(module, mesh=mesh, reshard_after_forward=True)  # else whole between evaluation steps, and in a swap
    for step in STEPS:
        register_fsdp_forward_method(module, step)


def repeated_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost module lists of ``module``: the layers of its text towers."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from repeated_layers(child)


WRAPPED_BY_FSDP1 = (
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "UNetMidBlock2DCrossAttn",
    "JointTransformerBlock",
    "CLIPEncoderLayer",
    "T5Block",
)
"""Classes of diffusers and transformers that our backbones' blocks and text layers have."""


def wraps_block(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """Auto-wrap policy of FSDP1, which decides by the module alone: a unit per block, as :func:`shard` makes groups.

    Args:
        module: Candidate.
        recurse: Whether it is asked if the children are to be looked at.
        nonwrapped_numel: Parameters that would be wrapped.
    """
    return recurse or type(module).__name__ in WRAPPED_BY_FSDP1
