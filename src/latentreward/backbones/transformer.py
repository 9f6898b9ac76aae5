"""Base class of the backbones from the first blocks of a transformer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from latentreward.backbones.base import DiffusionBackbone, check_taps
from latentreward.backbones.tuning import freeze
from latentreward.errors import check_range


class TransformerBackbone(DiffusionBackbone):
    """Backbone with visual and text taps on numbered blocks of a transformer; tap 0 is before the first block.

    Attributes:
        transformer: diffusers transformer.
        visual_taps: Numbers of the blocks whose visual tokens are read, ascending.
        text_taps: Numbers of the blocks whose text tokens are read, ascending; may be empty.
    """

    network_name = "transformer"
    transformer: Any
    visual_taps: tuple[int, ...]
    text_taps: tuple[int, ...]

    def choose_taps(
        self, depth: int, num_layers: int | None, visual_taps: Sequence[int], text_taps: Sequence[int]
    ) -> int:
        """Set the taps, and return the number of blocks to keep; raise InputError for a block that is not there."""
        check_range(f"[1, {depth}]", "the network has no more blocks", num_layers=num_layers)
        last = num_layers or depth
        self.visual_taps = check_taps("visual_taps", visual_taps, last, least=1)
        self.text_taps = check_taps("text_taps", text_taps, last)
        return num_layers or max([*visual_taps, *text_taps, 1])

    @property
    def last_tap(self) -> int:
        """Number of the last block that is run."""
        return max(*self.visual_taps, *self.text_taps, 0)

    def unread(self) -> tuple[str, ...]:
        """Return names of what no tap depends on in the transformer; it must not train or get adapters."""
        present = {name for name, _ in (*self.transformer.named_modules(), *self.transformer.named_parameters())}
        return tuple(name for name in self.unread_names() if name in present)

    @abstractmethod
    def unread_names(self) -> Iterable[str]:
        """Return the names of :meth:`unread`, with those of what the network need not have."""

    def drop_text_taps(self) -> None:
        """See :meth:`DiffusionBackbone.drop_text_taps`."""
        self.text_taps = ()
        freeze(self.transformer, self.unread())
