"""The policy that a command samples from: a pipeline alone, or with the adapter of an alignment run, or with a LoRA."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from reprlib import recursive_repr
from types import MethodType
from typing import Any

import torch

from latentreward.alignment import Policy, PolicySource, Reward, Sampling, load_policy
from latentreward.alignment.policies.checkpoint import read_policy_adapter
from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.apps.generation.lora import check_lora, load_lora
from latentreward.core.contracts import like_prompt
from latentreward.core.errors import InputError
from latentreward.core.registry import of_this_package
from latentreward.core.storage.digests import digest
from latentreward.diffusion.encoders.stored_prompts import OffloadedEncoder
from latentreward.reward.scorers.base import code_of
from latentreward.reward.scorers.plugins import settings_of
from latentreward.reward.scoring.find import fingerprint


@dataclass(frozen=True)
class TrainedPolicy:
    """A pipeline, optionally with a trained adapter. Weights are loaded by :meth:`load` only."""

    pipeline: PolicySource | None = None  # base pipeline; None takes the base recorded in ``checkpoint``
    checkpoint: Path | None = None  # checkpoint of an alignment run; its adapter is loaded into the pipeline
    lora: Path | None = None  # LoRA file or folder as written by ``latentreward export``, loaded into the pipeline

    def __post_init__(self) -> None:
        """Check that the given fields fit together."""
        if self.checkpoint is not None and self.lora is not None:
            raise InputError("checkpoint and lora both give the policy an adapter; give one of them")
        if self.checkpoint is None and self.pipeline is None:
            raise InputError("there is no generator; set policy.source, or the checkpoint of an alignment run")

    def source(self) -> PolicySource:
        """Return the source of the base pipeline."""
        if self.pipeline is None:
            assert self.checkpoint is not None
            return read_policy_adapter(self.checkpoint).source
        return self.pipeline

    def identity(self) -> dict[str, Any]:
        """Describe the policy in plain values, and its files, which must exist, by name, size and time of change."""
        if self.lora is not None:
            check_lora(self.lora)
        found: dict[str, Any] = {"policy": plain(self.source()), "checkpoint": None, "lora": None}
        for setting, path in (("checkpoint", self.checkpoint), ("lora", self.lora)):
            if path is not None:
                if not path.exists():
                    raise InputError(f"{setting}: {path} does not exist")
                files = [(file, file.stat()) for file in sorted((path, *path.rglob("*"))) if file.is_file()]
                described = [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in files]
                found[setting] = [str(path.resolve()), described]
        return found

    def load(self, device: torch.device, sampling: Sampling) -> Policy:
        """Load the policy on ``device``, frozen and in evaluation mode, to make pictures of ``sampling``'s size."""
        if self.checkpoint is not None:
            policy = load_policy(self.checkpoint, self.pipeline)
        else:
            policy = self.source().load()
            if self.lora is not None:
                load_lora(policy, self.lora)
            else:
                policy.adapters.set_default(())  # one of zeros would only take time
        policy.edit_at(sampling.height, sampling.width)
        return policy.eval().requires_grad_(False).to(device)


def offload_text_encoders(
    policy: Policy, rewards: Sequence[Reward], prompts: Sequence[str], device: torch.device
) -> None:
    """Keep text encoders in CPU memory, except while they encode, if the device is an accelerator."""
    if device.type == "cpu":
        return
    scorers = [part for reward in rewards for part in reward.modules() if isinstance(part, LatentScorer)]
    if policy.text_encoder is not None and policy.text_encoder.sees_sources:  # each edit has its own empty prompts
        empty = [policy.family.uncond_prompt, *("" for scorer in scorers if scorer.model.head.needs_uncond)]
        prompts = [one for prompt in prompts for one in (prompt, *(like_prompt(text, prompt) for text in empty))]
    offloaded = cache(lambda encoder: OffloadedEncoder(encoder, prompts, device))  # policy and reward may share one
    for scorer in scorers:
        if (encoder := scorer.model.backbone.text_encoder) is not None:
            scorer.set_text_encoder(offloaded(encoder))
    if policy.text_encoder is not None:
        policy.text_encoder = offloaded(policy.text_encoder)


def plain(value: Any) -> Any:
    """Convert ``value`` to types of JSON; objects and functions as :func:`described`."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, logging.Logger):  # its attributes lead to all other loggers
        return value.name
    return str(value) if isinstance(value, Path) else described(value)


def files_named(value: Any) -> dict[str, str]:
    """Return the fingerprints of the files and folders that plain values name: path → fingerprint.

    Workers compare them: the identity of a policy or scorer names files, and their times, which copies do not share.
    A text without slash and dot is a mere word.
    """
    if isinstance(value, dict | list):
        found = [files_named(one) for one in (value.values() if isinstance(value, dict) else value)]
        return {path: content for one in found for path, content in one.items()}
    named = isinstance(value, str) and {"/", "."} & {*value}
    return {value: fingerprint(value)} if named and os.path.exists(value) else {}  # noqa: PTH110 - a text may be too long


@recursive_repr("an object around it")
def described(value: Any) -> Any:
    """Describe an object or function by types of JSON.

    An object becomes a dict of its class name and attributes. One of another package's class becomes the dotted path of
    the class and a hash of its attributes, which may be secrets; a function becomes its dotted path, with a hash of
    what ``functools.partial`` or its object adds.
    """
    code = code_of(value)
    name = f"{code.__module__}.{code.__qualname__}"
    if isinstance(value, partial | MethodType):
        added = [value.func, value.args, value.keywords] if isinstance(value, partial) else value.__self__
        return f"{name}, {digest([repr(plain(added))])}"
    if code is value:
        return f"{name}{settings_of(value)}"
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    attributes = {field.name: getattr(value, field.name) for field in fields} or getattr(value, "__dict__", {})
    if isinstance(value, PolicySource):
        attributes = value.record()
    elif not of_this_package(code.__module__):
        return f"{name}, {digest([repr(plain(attributes))])}" if attributes else name
    return {"class": type(value).__qualname__, **plain(attributes)}
