"""FSDP2: each rank keeps a shard of every weight, and gathers whole weights only for the block that is computed.

Weights are gathered by groups. Groups are: each block of the network; each layer of the text encoder, and the rest of
the text encoder; the VAE; and the remaining modules (embeddings, norms, head, temperature). When a reward is trained,
the remaining modules are one group, whole for the length of a step. In a policy each of them is a group of its own,
because rollouts, callbacks and rewards that share the network call its parts at any time. Frozen weights are sharded
too. A group may hold frozen bfloat16 weights beside trainable float32 weights, because FSDP2 requires one dtype among
trainable weights only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from latentreward.core.checkpoints.base_weights import is_quantized
from latentreward.core.errors import InputError
from latentreward.diffusion import DiffusionBackbone
from latentreward.diffusion.backbones.base import LatentNetwork

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
"""Methods that Lightning calls in place of ``forward``; FSDP2 must gather weights for these too."""


def shard(module: nn.Module, backbone: DiffusionBackbone, mesh: DeviceMesh) -> None:
    """Apply ``fully_shard`` to a reward module, in place; a second call changes nothing.

    The module is built whole first, so each process needs CPU memory for the whole module once. The blocks of
    ``backbone`` become groups of their own. All ranks must hold the same weights.
    """
    if isinstance(module, FSDPModule):
        return
    check_axes(module)
    for block in backbone.blocks():
        fully_shard(block, mesh=mesh)
    shard_encoders(backbone.text_encoder, called_equally(backbone), mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)  # else whole between evaluation steps and in an EMA swap
    for step in STEPS:
        register_fsdp_forward_method(module, step)


def shard_policy(policy: Any, mesh: DeviceMesh) -> None:
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


def shard_scorers(backbones: Iterable[DiffusionBackbone], own: Set[nn.Module], mesh: DeviceMesh) -> None:
    """Shard the large modules of a policy's reward that are its ``own``: blocks of networks, and text encoders.

    The reward's other modules are frozen, and stay whole on every rank.
    """
    for backbone in backbones:
        for block in backbone.blocks():
            if block in own:  # called by itself, it would stay whole without reshard_after_forward
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
        shard_encoders(backbone.text_encoder if backbone.text_encoder in own else None, None, mesh)


def called_equally(network: LatentNetwork) -> nn.Module | None:
    """Return the VAE, which all ranks must call equally often once it is sharded; None for an editor.

    An editor's VAE encodes the pictures to edit that a rank has not kept, unlike many on each rank.
    """
    return network.vae if network.source_encoder is None else None


def shard_encoders(text_encoder: nn.Module | None, vae: nn.Module | None, mesh: DeviceMesh) -> None:
    """Shard text encoders by layer, and a VAE as a whole; None leaves one out.

    Without ``reshard_after_forward`` an encoder that is called by itself, as in a policy, would stay whole after the
    call, and a checkpoint that Lightning loads afterwards would not fit.
    """
    if text_encoder is not None:
        for layer in repeated_layers(text_encoder):
            fully_shard(layer, mesh=mesh)
        # Not its text towers: fully_shard changes a module's class, by which transformers finds the outputs to record.
        fully_shard(text_encoder, mesh=mesh, reshard_after_forward=True)
    if vae is not None:
        fully_shard(vae, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(vae, "encode")
        register_fsdp_forward_method(vae, "decode")


def check_axes(module: nn.Module) -> None:
    """Raise InputError if a parameter is a scalar, which has no axis to shard, or quantised."""
    for name, parameter in module.named_parameters():
        if is_quantized(parameter):
            raise InputError(f"parameter {name} is quantised, which FSDP2 cannot shard; use ddp, or no quantization")
        if parameter.ndim == 0:
            raise InputError(f"parameter {name} is a scalar, which FSDP2 cannot shard; give it the shape (1,)")


def repeated_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost module lists in ``module``: the layers of its text towers."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from repeated_layers(child)
