"""Hashes of encoders: two encoders with equal hashes compute equal latents or embeddings.

A cache records the hashes of the encoders that wrote it. Training compares them with those of the reward model's own
encoders.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from latentreward.errors import InputError
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
"""Entries of a VAE's config on which its latents depend."""
OTHER_VAE_FIELDS = ("z_dim", "base_dim", "dim_mult", "num_res_blocks", "latents_mean", "latents_std", "batch_norm_eps")
"""Entries that only VAEs of other classes than ``AutoencoderKL`` set."""
PROBES = ("", "A café\u2019s <b>3</b> cats &amp; one dog, 100 % red")
"""Prompts whose tokens tell templates, dropped and added tokens, padding, and repaired text."""
CHUNK = 2**22
"""Number of values of a tensor that are converted and hashed at a time, to limit memory."""


def vae_fingerprint(vae: "AutoencoderKL") -> str:
    """Return a hash (32 hexadecimal digits) of a VAE's encoder: weights as float32, and config.

    VAEs that differ only in their decoders have equal hashes, because their latents are equal. One VAE loaded in
    float32 and in bfloat16 has two hashes, because rounded weights change the latents.

    Args:
        vae: diffusers VAE, on any device.
    """
    parts = [part for part in (vae.encoder, vae.quant_conv, getattr(vae, "bn", None)) if part is not None]
    config = {name: vae.config.get(name) for name in VAE_FIELDS}
    config |= {name: vae.config[name] for name in OTHER_VAE_FIELDS if vae.config.get(name) is not None}
    return _fingerprint(parts, config, torch.float32)


def text_fingerprint(encoder: "PromptEncoder") -> str:
    """Return a hash (32 hexadecimal digits) of text encoders: weights, tokens of fixed prompts, length of prompts.

    Weights are rounded to bfloat16 before they are hashed. A frozen text encoder therefore has one hash, whether
    training stores it in float32 or in bfloat16, and cached embeddings of one are used for the other.

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
    if encoder.tokens_in_fingerprint:
        with suppress(InputError):  # an encoder that is given token ids has no tokenizer
            config["tokens"] = [ids.tolist() for ids in encoder.tokenize(PROBES)]
    return _fingerprint([encoder], config, torch.bfloat16)


def _fingerprint(modules: Iterable[nn.Module], config: dict[str, Any], dtype: torch.dtype) -> str:
    """Hash the floating point tensors of ``modules`` and ``config``.

    Names and order of the tensors do not count, because they change with the versions of diffusers and transformers.
    """
    tensors = [tensor for module in modules for tensor in module.state_dict().values() if tensor.is_floating_point()]
    hashes = []
    for tensor in tensors:
        parts = (part.to("cpu", dtype).contiguous() for part in tensor.detach().reshape(-1).split(CHUNK))
        hashes.append(digest(chain([str(tuple(tensor.shape))], (part.view(torch.uint8).numpy() for part in parts))))
    return digest([json.dumps([config, sorted(hashes)], sort_keys=True)])
