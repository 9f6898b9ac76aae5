"""Fast switching between the peft adapters of one network."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


class AdapterSwitch:
    """A switch that activates the peft adapters of a network and leaves ``requires_grad`` alone.

    peft's own switches (``set_adapter``, ``disable_adapters``) change ``requires_grad`` and take milliseconds. This
    class sets only the two private fields of peft's layers that decide the forward pass.

    Args:
        network: Network with adapters. Call :meth:`refresh` after an adapter is added later.
        default: Name of the adapter, or names of the adapters, active outside any :meth:`use`.
    """

    def __init__(self, network: nn.Module, default: str | Sequence[str]) -> None:
        self._network = network
        self._default = [default] if isinstance(default, str) else list(default)
        self.refresh()

    def refresh(self) -> None:
        """Find the adapter layers again, and activate the default adapters."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers = [module for module in self._network.modules() if isinstance(module, BaseTunerLayer)]
        self._names = {
            name for layer in self._layers for names in layer.adapter_layer_names for name in getattr(layer, names)
        }
        for layer in self._layers:
            layer._active_adapter, layer._disable_adapters = list(self._default), False

    @property
    def working(self) -> tuple[str, ...]:
        """Adapters that are at work."""
        layer = next(iter(self._layers), None)
        return () if layer is None or layer._disable_adapters else tuple(layer._active_adapter)

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Activate adapter ``name`` alone, or no adapter if ``name`` is None; on exit restore what was active before.

        With gradient checkpointing, call ``backward`` inside the context: checkpointed blocks are computed again with
        the adapter that is active at that time.

        Raises:
            ValueError: If no layer has an adapter ``name``; peft would silently run the network without adapters.
        """
        if name is not None and name not in self._names:
            raise ValueError(
                f"the network has no adapter {name!r}, only {sorted(self._names)}; call refresh() after adding"
            )
        before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        try:
            for layer in self._layers:
                layer._active_adapter, layer._disable_adapters = [] if name is None else [name], name is None
            yield
        finally:
            for layer, active, disabled in before:
                layer._active_adapter, layer._disable_adapters = active, disabled


def add_frozen_adapter(network: nn.Module, config: Any, name: str) -> dict[str, nn.Parameter]:
    """Add an adapter to a network whose other adapters stay as they are, active or not, trainable or not.

    Call :meth:`AdapterSwitch.refresh` afterwards.

    Returns:
        The new adapter's parameters by their names in ``network``, frozen, with peft's initial values, in the types of
        the layers' weights.
    """
    from peft import inject_adapter_in_model

    trains = {parameter for parameter in network.parameters() if parameter.requires_grad}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, network, name)
    for parameter in network.parameters():  # peft has made the new adapter the one that trains
        parameter.requires_grad_(parameter in trains)
    return {key: parameter for key, parameter in network.named_parameters() if f".{name}." in key}
