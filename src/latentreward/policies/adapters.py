"""Which of the adapters of one network is at work."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


class AdapterSwitch:
    """Switches peft's adapters of a network without touching what trains.

    peft's own switches (``set_adapter``, ``disable_adapters``) change ``requires_grad`` and take milliseconds; this one
    sets the two private fields that decide the forward pass.

    Args:
        network: Network with adapters; adapters may be added later, after which :meth:`refresh` is called.
        default: Adapter, or adapters, at work outside any :meth:`use`.
    """

    def __init__(self, network: nn.Module, default: str | Sequence[str]) -> None:
        self._network = network
        self._default = [default] if isinstance(default, str) else list(default)
        self.refresh()

    def refresh(self) -> None:
        """Find the adapter layers again, and put the default adapter to work."""
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
        """Have adapter ``name`` alone at work, None for the bare network; what was before comes back, whatever happens.

        With gradient checkpointing, back-propagate before leaving: blocks are computed again with the adapter that is
        at work then.

        Raises:
            ValueError: If no layer has an adapter ``name``; peft would leave the network bare without a word.
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
