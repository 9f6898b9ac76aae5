"""The frozen base model under a module's trained weights: checked before training, recorded in checkpoints."""

from collections.abc import Collection, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from latentreward.checkpoints.base_weights import BaseSample, quantized_names
from latentreward.checkpoints.shards import check_weights, frozen_names
from latentreward.encoders.prompts import PromptEncoder
from latentreward.errors import InputError
from latentreward.modules.frozen import refuse_quantized, share_frozen
from latentreward.modules.fsdp1 import FSDP1Precision

UNSEEN = ("quantization", "family")
"""Settings of a base that are not seen in the samples of its weights."""


def unseen_settings(place: str, given: Mapping[str, Any], encoder: PromptEncoder | None) -> dict[str, Any]:
    """Return the settings of a base that are not seen in the samples of its weights, for :class:`FrozenBase`.

    ``place`` is the name of the base in the run's settings; ``encoder`` knows the ``t5_length`` that null stands for.
    """
    found = {f"{place}.{name}": given.get(name) for name in UNSEEN}
    if encoder is not None:  # encoders whose tokens are T5's alone have no number of their own for T5
        found[f"{place}.t5_length"] = getattr(encoder, "t5_length", encoder.num_tokens)
    return found


class FrozenBase:
    """Frozen base model on which a module trains weights.

    Args:
        weights: The module, or its part, that holds the base's weights.
        source: Folder or hub id that they come from.
        settings: Settings of the base that are not seen in its weights and that a resumed run must not change, by the
            names of the run's settings.
        dtype_setting: Name of the setting that stores frozen weights in bfloat16, for messages.
    """

    def __init__(
        self, weights: nn.Module, source: str, settings: Mapping[str, Any], dtype_setting: str = "frozen_dtype"
    ) -> None:
        self.weights, self.source, self.settings, self.dtype_setting = weights, source, settings, dtype_setting
        self._sample: BaseSample | None = None

    @property
    def sample(self) -> BaseSample:
        """Values of the frozen weights: those that :meth:`prepare` sampled before weights were sharded."""
        return self._sample or BaseSample.of(self.weights, self.source)

    def prepare(self, module: LightningModule) -> None:
        """Prepare ``module`` for its trainer, in ``setup``: weights that train stay float32, frozen ones are shared.

        In bfloat16, an update that is small beside its weight would be lost.

        Raises:
            InputError: If ``trainer.precision`` is not 32-true, 16-mixed or bf16-mixed, or FSDP1 is to shard quantised
                weights.
        """
        if module.trainer.precision not in ("32-true", "16-mixed", "bf16-mixed"):
            raise InputError(
                f"trainer.precision={module.trainer.precision}: what trains must be float32; use bf16-mixed (with "
                f"{self.dtype_setting}: bfloat16 for the frozen weights), 16-mixed or 32-true"
            )
        strategy = module.trainer.strategy
        # Lightning's precision of FSDP1 converts frozen dataclasses, and does not clip by norm.
        if isinstance(strategy, FSDPStrategy):
            refuse_quantized(module, "FSDP1")
            strategy.precision_plugin = FSDP1Precision(strategy.precision_plugin, strategy)
        # Once, in the first stage: afterwards weights are sharded, and a shard's values are no sample of the whole.
        if self._sample is None:
            self._sample = self.sample
            share_frozen(module, module.trainer)

    def save(self, module: nn.Module, checkpoint: dict[str, Any], saved: Collection[str]) -> None:
        """Record the base in a checkpoint of ``module``, as far as frozen weights are not among the ``saved`` names.

        Quantised layers are left out, because only their library can read them.
        """
        # Popped first: what the checkpoint does not hold is recorded as a sample of the base below.
        for name in quantized_names(module):
            checkpoint["state_dict"].pop(name, None)
        checkpoint["base_settings"], checkpoint["base"] = dict(self.settings), self.sample.record(saved)

    def check(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint belongs to this base, and fill in the weights that it leaves out.

        Quantised layers are filled in from this base. So are all frozen weights that the checkpoint leaves out, if it
        is of a quantised run, or outside a Trainer, where ``load_from_checkpoint`` calls the hook.

        Raises:
            InputError: If the checkpoint belongs to another base, or a resumed run has other ``settings``.
        """
        if "base" in checkpoint:
            self.sample.check(checkpoint["base"])
        trained = checkpoint.get("base_settings", {})
        if names := quantized_names(module):
            checkpoint["state_dict"] |= own_values(module, names)
        elif any(
            value and name.endswith("quantization") for name, value in trained.items()
        ):  # which left those layers out
            checkpoint["state_dict"] = {**own_values(module, frozen_names(module)), **checkpoint["state_dict"]}
        try:
            fitting = module.trainer.state.fn == TrainerFn.FITTING
        except RuntimeError:  # of a module without a trainer
            check_weights(module, {name: value.shape for name, value in checkpoint["state_dict"].items()})
            left_out = own_values(module, frozen_names(module)) if "base" in checkpoint else {}
            checkpoint["state_dict"] = {**left_out, **checkpoint["state_dict"]}
            return
        for name, ours in self.settings.items() if fitting else ():
            theirs = trained.get(name, ours)
            if theirs != ours:
                raise InputError(
                    f"the checkpoint was trained with {name}={theirs}, not {ours}; give {name} as it was, or start a "
                    "new run"
                )


def own_values(module: nn.Module, names: Collection[str]) -> dict[str, Any]:
    """Return those of the named entries that ``load_state_dict`` takes: not what a library of quantisation adds."""
    own = (*module.named_parameters(remove_duplicate=False), *module.named_buffers())
    state = module.state_dict()
    return {name: state[name] for name, _ in own if name in names and name in state}
