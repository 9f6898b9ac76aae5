"""The generator that a command samples from: a pipeline, as it is or with what an alignment run has learned."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentreward.errors import InputError
from latentreward.generation import load_lora
from latentreward.generation.lora import check_lora
from latentreward.policies import Policy, PolicySource, load_policy
from latentreward.policies.checkpoint import read_policy_adapter


@dataclass(frozen=True)
class TrainedPolicy:
    """A generator; nothing heavy is loaded before :meth:`load`.

    Attributes:
        pipeline: The base; what the checkpoint notes where it is None.
        checkpoint: Checkpoint of an alignment run, whose adapter is put to work.
        lora: LoRA file or folder to put to work, as ``latentreward export`` writes it.

    Raises:
        InputError: If both or neither say what it is.
    """

    pipeline: PolicySource | None = None
    checkpoint: Path | None = None
    lora: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what says too much or too little."""
        if self.checkpoint is not None and self.lora is not None:
            raise InputError("checkpoint and lora both say what the policy has learned; give one of them")
        if self.checkpoint is None and self.pipeline is None:
            raise InputError("there is no generator; set policy.source, or the checkpoint of an alignment run")

    def source(self) -> PolicySource:
        """Where the base comes from."""
        if self.pipeline is None:
            assert self.checkpoint is not None
            return read_policy_adapter(self.checkpoint).source
        return self.pipeline

    def identity(self) -> dict[str, Any]:
        """What its pictures depend on, in plain values; files by name, size and time."""
        if self.lora is not None:
            check_lora(self.lora)
        return {
            "policy": plain(self.source()),
            "checkpoint": _files("checkpoint", self.checkpoint),
            "lora": _files("lora", self.lora),
        }

    def load(self, device: torch.device) -> Policy:
        """The policy on ``device``, in evaluation mode and without gradients.

        Raises:
            InputError: If a part cannot be loaded, or does not fit.
        """
        if self.checkpoint is not None:
            policy = load_policy(self.checkpoint, self.pipeline)
        else:
            policy = self.source().load()
            if self.lora is not None:
                load_lora(policy, self.lora)
        return policy.eval().requires_grad_(False).to(device)


def _files(setting: str, path: Path | None) -> list[Any] | None:
    """What tells a file from a later one of the same name."""
    if path is None:
        return None
    if not path.exists():
        raise InputError(f"{setting}: {path} does not exist")
    files = sorted(file for file in (path, *path.rglob("*")) if file.is_file())
    return [str(path.resolve()), [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]]


def plain(value: Any) -> Any:
    """``value`` in what JSON knows; objects as their class and attributes."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, Path):
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    attributes = {field.name: getattr(value, field.name) for field in fields} or getattr(value, "__dict__", {})
    return {"class": type(value).__qualname__, **plain(attributes)}
