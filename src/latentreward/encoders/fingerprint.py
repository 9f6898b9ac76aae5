"""Short hashes that tell whether two encoders give the same latents or embeddings.

A cache names the encoders that made it; training compares them with the reward model's own.
"""

import json
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from latentreward.storage.digests import digest

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from latentreward.encoders.prompts import PromptEncoder

VAE_FIELDS = (
    "in_channels",
    "latent_channels",
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "norm_num_groups",
    "mid_block_add_attention",
    "scaling_factor",
    "shift_factor",
)
"""What of a VAE's config changes its latents."""
CHUNK = 2**22


def vae_fingerprint(vae: "AutoencoderKL") -> str:
    """Hash (32 hexadecimal digits) of the encoder half of a VAE: its weights as float32, and its config.

    VAEs that differ in their decoders alone share it: their latents are the same. One VAE loaded in float32 and in
    bfloat16 does not: rounded weights give other latents.

    Args:
        vae: diffusers VAE, on any device.
    """
    parts = [part for part in (vae.encoder, vae.quant_conv) if part is not None]
    config = {name: vae.config.get(name) for name in VAE_FIELDS}
    return _fingerprint(parts, config, torch.float32)


def text_fingerprint(encoder: "PromptEncoder") -> str:
    """Hash (32 hexadecimal digits) of text encoders: weights as bfloat16, sizes of the tokenizers, length of prompts.

    Weights are rounded first, so that a frozen text encoder has one fingerprint in float32 and in bfloat16: it may be
    stored either way in training, and the embeddings of one stand for those of the other.

    Args:
        encoder: Text encoders with their tokenizers, on any device.
    """
    tokenizers = [getattr(encoder, f"tokenizer{number}", None) for number in ("", "_2", "_3")]
    config = {
        "kind": type(encoder).__name__,
        "num_tokens": encoder.num_tokens,
        "token_dim": encoder.token_dim,
        "pooled_dim": encoder.pooled_dim,
        "tokenizers": [None if tokenizer is None else len(tokenizer) for tokenizer in tokenizers],
    }
    return _fingerprint([encoder], config, torch.bfloat16)


def _fingerprint(modules: Iterable[nn.Module], config: dict[str, Any], dtype: torch.dtype) -> str:
    """Hash over the tensors without their names and order, which change with the version of a library."""
    tensors = [tensor for module in modules for tensor in module.state_dict().values() if tensor.is_floating_point()]
    hashes = []
    for tensor in tensors:
        parts = (part.to("cpu", dtype).contiguous() for part in tensor.detach().reshape(-1).split(CHUNK))
        hashes.append(digest(chain([str(tuple(tensor.shape))], (part.view(torch.uint8).numpy() for part in parts))))
    return digest([json.dumps([config, sorted(hashes)], sort_keys=True)])
