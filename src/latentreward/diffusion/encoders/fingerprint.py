"""Hashes of encoders: two encoders with equal hashes compute equal latents or embeddings.

A cache records the hashes of the encoders that wrote it. Training compares them with those of the reward model's own
encoders.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentreward.core.errors import InputError
from latentreward.core.storage.digests import digest

if TYPE_CHECKING:
    from latentreward.diffusion.encoders.prompts import PromptEncoder

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
"""Entries of the config of an ``AutoencoderKL`` on which its latents depend."""
OTHER_VAE_FIELDS = ("z_dim", "base_dim", "dim_mult", "num_res_blocks", "latents_mean", "latents_std", "batch_norm_eps")
"""Entries that the other VAEs of :data:`LISTED_VAES` set."""
LISTED_VAES = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLWan", "AutoencoderKLQwenImage")
"""VAEs of which the listed entries count; of others, the whole config counts."""
DECODING = ("decoder", "post_quant_conv")  # names of the parts of a VAE on which its latents do not depend
PROBES = ("", "A café\u2019s <b>3</b> cats &amp; one dog, 100 % red")
"""Prompts whose tokens tell templates, dropped and added tokens, padding, and repaired text."""
CHUNK = 2**22  # number of values of a tensor that are converted and hashed at a time, to limit memory


def vae_fingerprint(vae: nn.Module) -> str:
    """Return a hash (32 hexadecimal digits) of a VAE's encoder: weights as float32, and config.

    VAEs that differ only in their decoders have equal hashes. One VAE in float32 and in bfloat16 has two hashes,
    because rounded weights change the latents. Its ``config`` may be a mapping, any object, or missing.
    """
    found = getattr(vae, "config", {})
    found = found if isinstance(found, Mapping) else vars(found)
    if type(vae).__name__ in LISTED_VAES:
        config = {name: found.get(name) for name in VAE_FIELDS}
        config |= {name: found[name] for name in OTHER_VAE_FIELDS if found.get(name) is not None}
    else:
        config = {name: found[name] for name in found if not name.startswith(("_", "decoder"))}
        config["kind"] = type(vae).__name__
    weights = {name: tensor for name, tensor in vae.state_dict().items() if name.split(".")[0] not in DECODING}
    return _fingerprint(weights.values(), config, torch.float32)


def text_fingerprint(encoder: "PromptEncoder") -> str:
    """Return a hash (32 hexadecimal digits) of text encoders: weights, tokens of fixed prompts, length of prompts.

    Weights are rounded to bfloat16 before: a frozen encoder has one hash, stored in float32 or in bfloat16.
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
    if encoder.picture_settings:  # encoders of texts alone keep the hashes that caches hold
        config["pictures"] = dict(encoder.picture_settings)
    return _fingerprint(encoder.state_dict().values(), config, torch.bfloat16)


def _fingerprint(weights: Iterable[Tensor], config: dict[str, Any], dtype: torch.dtype) -> str:
    """Hash the floating point tensors, whose names and order change with the libraries' versions, and ``config``."""
    hashes = []
    for tensor in (weight for weight in weights if weight.is_floating_point()):
        parts = (part.to("cpu", dtype).contiguous() for part in tensor.detach().reshape(-1).split(CHUNK))
        hashes.append(digest(chain([str(tuple(tensor.shape))], (part.view(torch.uint8).numpy() for part in parts))))
    return digest([json.dumps([config, sorted(hashes)], sort_keys=True, default=str)])
