"""Base class of the backbones from the first blocks of a transformer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import nn

from latentreward.core.errors import check_range
from latentreward.diffusion.backbones.base import DiffusionBackbone, check_taps
from latentreward.diffusion.backbones.passes import FirstBlocks, PassEnded, recorded
from latentreward.diffusion.backbones.tuning import freeze


class TransformerBackbone(DiffusionBackbone):
    """Backbone with visual and text taps on numbered blocks of a transformer; tap 0 is before the first block.

    Attributes:
        transformer: diffusers transformer.
        lists: Names of the transformer's lists of blocks, in the order in which they run.
        tail: Names of the transformer's modules and weights after the last block.
        visual_taps: Numbers of the blocks whose visual tokens are read, ascending.
        text_taps: Numbers of the blocks whose text tokens are read, ascending; may be empty.
    """

    network_name = "transformer"
    transformer: Any
    lists: Sequence[str] = ("transformer_blocks",)
    tail: Sequence[str] = ("norm_out", "proj_out")
    visual_taps: tuple[int, ...]
    text_taps: tuple[int, ...]

    def keep_blocks(
        self, transformer: Any, num_layers: int | None, visual_taps: Sequence[int], text_taps: Sequence[int]
    ) -> None:
        """Set transformer and taps, and drop the blocks after the first ``num_layers``; None keeps those up to a tap.

        Raises:
            InputError: If a tap or ``num_layers`` is over the number of blocks.
        """
        self.block_counts = [len(getattr(transformer, name)) for name in self.lists]  # before any are dropped
        depth = sum(self.block_counts)
        check_range(f"[1, {depth}]", "the network has no more blocks", num_layers=num_layers)
        self.visual_taps = check_taps("visual_taps", visual_taps, num_layers or depth, least=1)
        self.text_taps = check_taps("text_taps", text_taps, num_layers or depth)
        self.transformer, kept = transformer, num_layers or max([*visual_taps, *text_taps, 1])
        for name in self.lists:
            blocks = getattr(transformer, name)
            setattr(transformer, name, blocks[:kept])
            kept = max(0, kept - len(blocks))

    @property
    def last_tap(self) -> int:
        """Number of the last block that is run; the output map needs one."""
        return max(*self.visual_taps, *self.text_taps, int(self.output_map))

    def blocks(self) -> Iterator[nn.Module]:
        for name in self.lists:
            yield from getattr(self.transformer, name)

    @contextmanager
    def recorded(self, modules: Sequence[str]) -> Iterator[dict[int | str, Any]]:
        """Record a pass of the transformer that the body of the context makes, and end it behind the last tap.

        With an output map the pass goes on with the output layers.

        Args:
            modules: Names of modules whose outputs are recorded by name.

        Returns:
            What each tapped block returns, by number; 0 is what the first block takes: text and visual tokens, or joint
            ones.
        """
        network, blocks, last = self.transformer, [*self.blocks()], self.last_tap
        watched: dict[int | str, nn.Module] = {name: network.get_submodule(name) for name in modules}
        watched |= {tap: blocks[tap - 1] for tap in (*self.visual_taps, *self.text_taps) if tap}
        lists, left = {}, max(last, 1)
        for name, count in zip(self.lists, self.block_counts, strict=True):
            kept = [*getattr(network, name)][:left]
            lists[name] = FirstBlocks(kept, count, len(kept) == left and not self.output_map)
            left -= len(kept)

        def begin(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = signature(getattr(block, "module", block).forward).bind(*inputs, **named).arguments  # FSDP1: module
            tokens, text = next(iter(given.values())), given.get("encoder_hidden_states")
            seen[0] = tokens if text is None else (text, tokens)
            if not last:
                raise PassEnded

        # Before FSDP2's own hook, which gathers the weights of a block.
        hook = blocks[0].register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
        with hook, recorded(network, lists, watched) as seen:
            yield seen

    def unread(self) -> tuple[str, ...]:
        """Return names of what no tap depends on in the transformer; it must not train or get adapters."""
        last, network = self.last_tap, self.transformer
        numbered = [f"{name}.{index}" for name in self.lists for index in range(len(getattr(network, name)))]
        inside, outside = self.unread_parts(last, last in self.visual_taps or self.output_map, last in self.text_taps)
        names = [*numbered[last:], *outside, *(() if self.output_map else self.tail)]
        names += [f"{numbered[last - 1]}.{part}" for part in inside if last]
        present = {name for name, _ in (*network.named_modules(), *network.named_parameters())}
        return tuple(name for name in names if name in present)

    @abstractmethod
    def unread_parts(self, number: int, visual: bool, text: bool) -> tuple[Sequence[str], Sequence[str]]:
        """Return names of what taps up to block ``number`` do not depend on: inside this block, and outside blocks.

        Args:
            number: Number of the last tapped block.
            visual: Whether its visual tokens are read.
            text: Whether its text tokens are read.
        """

    def drop_text_taps(self) -> None:
        self.text_taps = ()
        freeze(self.transformer, self.unread())
