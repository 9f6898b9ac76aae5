"""Base class of the families of rectified-flow transformers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentreward.core.contracts import Conditioning
from latentreward.core.errors import InputError, first_line
from latentreward.core.promises import returns
from latentreward.core.storage.json_files import entries, entry
from latentreward.diffusion.backbones.loading import check_channels
from latentreward.diffusion.encoders.prompts import PromptEncoder, check_length
from latentreward.diffusion.families.base import Family, PipelineConfigs, wrong_prediction
from latentreward.diffusion.noise.processes import ContinuousFlow, NoiseProcess, process_from_scheduler
from latentreward.diffusion.noise.schedules import DDPM_SCHEDULERS, shifted_levels


class FlowFamily(Family):
    """Family of transformers that predict the velocity ε − x_0 of a rectified flow.

    Also the base of transformers of a DDPM process, whose family sets ``flow`` to False and returns ε or v from
    :meth:`velocity`, where ``sigma`` is then the timestep divided by 1000.

    A derived class implements :meth:`velocity`, one pass of the whole network as the pipeline makes it. Backbones read
    features from the blocks in this pass; :meth:`split` tells where the tokens of picture and text lie.

    Attributes:
        lists: Names of the network's lists of blocks, in the order in which they run.
        tail: Names of the network's modules after the last block.
        packing: Number of latent pixels along each side that the network joins to one token.
        positions: Number of latent pixels whose channels the network's ``in_channels`` counts together.
        axes_lens: Default of the config's ``axes_lens``: numbers of positions for tokens of the prompt, rows and
            columns; empty for networks that compute positions of any number.
        constant_text: Whether text tokens are the same after all blocks.
        pixels: Height and width at which the model was trained.
        time_embedding: Names of the network's modules whose outputs make the timestep embedding, see :meth:`temb`.
        refines: Whether layers before the first block take the timestep embedding.
        sinusoids: Name of the module that makes sinusoids of the noise levels, and the factor of σ in what it takes,
            for networks that round it to the type of the tokens; bfloat16 would join several levels to one.
        t5_tokens: Usual and largest number of T5 tokens per prompt; (0, 0) without T5.
        text_field: Field of the network's config with the width of the text encoder's tokens.
        text_input: Names of modules and weights before the blocks that only text tokens depend on.
        modulation: Names of modules and weights outside the blocks that make the modulation of all blocks.
        text_output: Names of a block's submodules that only its text output depends on.
        visual_output: Names of a block's submodules that only its visual output depends on.
    """

    lists: ClassVar[Sequence[str]] = ()
    tail: ClassVar[Sequence[str]] = ("norm_out", "proj_out")
    packing: ClassVar[int] = 2
    positions: ClassVar[int] = 1
    axes_lens: ClassVar[Sequence[int]] = ()
    constant_text: ClassVar[bool] = False
    pixels: ClassVar[tuple[int, int]] = (1024, 1024)
    time_embedding: ClassVar[Sequence[str]] = ("time_text_embed",)
    refines: ClassVar[bool] = False
    sinusoids: ClassVar[tuple[str, float] | None] = None
    t5_tokens: tuple[int, int] = (0, 0)
    text_field: ClassVar[str] = "joint_attention_dim"
    text_input: ClassVar[Sequence[str]] = ()
    modulation: ClassVar[Sequence[str]] = ()
    text_output: ClassVar[Sequence[str]] = ()
    visual_output: ClassVar[Sequence[str]] = ()

    @classmethod
    def recognises(cls, pipeline: PipelineConfigs) -> bool:
        return pipeline.has(cls.part) and pipeline.config(cls.part).get("_class_name") == cls.network_class

    def check(self) -> None:
        check_channels(self.pipeline.source, self.part, self.config, self.latent_space, self.positions)

    @property
    def distilled(self) -> bool:
        """Whether ``model_index.json`` says that the model was distilled to sample in few steps without guidance."""
        return entry(self.pipeline.index, "is_distilled", bool, self.named("model_index.json"), default=False)

    # Latents

    @property
    def native_size(self) -> tuple[int, int]:
        return self.pixels

    @property
    def side_multiple(self) -> int:
        return self.latent_space.downscale * self.packing

    @cached_property
    def lens(self) -> tuple[int, ...]:
        """Numbers of positions of the network, as :attr:`axes_lens`."""
        return entries(self.config, "axes_lens", int, self.named(self.part), self.axes_lens) if self.axes_lens else ()

    @property
    def max_side(self) -> int | None:
        return self.packing * min(self.lens[1:]) if self.lens else None

    @property
    def max_prompt(self) -> int | None:
        """Largest number of tokens of a prompt for which the network has positions; None for any."""
        return self.lens[0] - 1 if self.lens else None  # the image has the position after the prompt

    @property
    def pooled_dim(self) -> int:
        """Number of features of a pooled prompt; the default is that of a token, see :meth:`Conditioning.pooled`."""
        return self.text_dim

    @property
    def text_dim(self) -> int:
        """Number of features of a token of the text encoder, by the config's :attr:`text_field`."""
        return self.entry(self.part, self.text_field, int)

    @cached_property
    def dual_blocks(self) -> int:
        """Number of blocks with weights of their own for texts, which are before the others, in a network with both."""
        return self.entry(self.part, "num_layers", int)

    def fitting(self, encoder: PromptEncoder) -> PromptEncoder:
        """Return a text encoder whose output is as wide as the network's config says."""
        for output, given, taken in (
            ("tokens", encoder.token_dim, self.text_dim),
            ("pooled vectors", encoder.pooled_dim or encoder.token_dim, self.pooled_dim),
        ):
            if given != taken:
                raise InputError(
                    f"source={self.pipeline.source!r}: the text encoder's {output} are {given} wide, but the "
                    f"{self.part} takes {taken}; all parts must come from one pipeline"
                )
        return encoder

    def load_prompt_encoder(
        self, t5_length: int | None = None, load_t5: bool = True, pretrained: bool = True
    ) -> PromptEncoder:
        """See :meth:`Family.load_prompt_encoder`; with T5, ``t5_length`` None takes the first of :attr:`t5_tokens`."""
        usual, most = self.t5_tokens
        if most and not load_t5:
            raise InputError(f"load_t5=false: {self.title} takes a prompt's tokens from T5; leave load_t5 out")
        length = check_length(usual if t5_length is None else t5_length, 1, most) if most else 0
        return self.fitting(self.prompt_encoder(partial(self.pipeline.load, pretrained=pretrained), length))

    def prompt_encoder(self, load: Any, length: int) -> PromptEncoder:
        """Make the prompt encoder with parts that ``load(class, name)`` loads, for ``length`` tokens of T5 if any."""
        raise NotImplementedError(f"{type(self).__name__} has no prompt_encoder")

    def chat_tokenizer(self) -> Any:
        """Load the pipeline's tokenizer, whose chat template the prompts get."""
        tokenizer = self.pipeline.tokenizer("tokenizer")
        try:
            turn = [{"role": "user", "content": "a cat"}]
            tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template raises what it likes
            raise InputError(
                f"{self.named('tokenizer')} has no chat template that can be rendered ({first_line(error)}), with "
                f"which {self.title} encodes prompts; download tokenizer again"
            ) from error
        return tokenizer

    # Noise

    @cached_property
    def noise_process(self) -> NoiseProcess:
        """See :attr:`Family.noise_process`; of a family that is no flow, that of the pipeline's scheduler."""
        return ContinuousFlow() if self.flow else process_from_scheduler(self.scheduler_config, DDPM_SCHEDULERS)

    def mu(self, num_inference_steps: int, shape: Sequence[int]) -> float:
        """Return the logarithm of the shift for a dynamic schedule; arguments as in :meth:`levels`.

        The default is :meth:`linear_mu` of the number of tokens, as in most pipelines.
        """
        return self.linear_mu(math.prod((*shape[1:-2], *(side // self.packing for side in shape[-2:]))))

    def linear_mu(self, tokens: int) -> float:
        """Return the logarithm of the shift that the scheduler config gives linearly in the number of tokens."""
        few = self.entry("scheduler", "base_image_seq_len", int, 256)
        many = self.entry("scheduler", "max_image_seq_len", int, 4096)
        low, high = (
            self.entry("scheduler", f"{end}_shift", float, usual) for end, usual in (("base", 0.5), ("max", 1.15))
        )
        return float(low + (high - low) * (tokens - few) / (many - few))

    def levels(self, num_inference_steps: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        dynamic = self.entry("scheduler", "use_dynamic_shifting", bool, default=False)
        return shifted_levels(
            self.scheduler_config, num_inference_steps, self.mu(num_inference_steps, shape) if dynamic else None
        )

    # Network

    def predict(
        self, network: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        self.check_sources(len(conditioning.source_latents))
        scale = self.default_guidance if guidance is None else guidance
        sigma = timesteps.to(latents.device, torch.float32) / 1000
        return self.velocity(network, latents, sigma, conditioning, scale)

    @abstractmethod
    @returns(wrong_prediction)
    def velocity(
        self, network: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        """Predict the velocity ε − x_0 ``(B, C, ...)`` by one pass of the network, as the family's pipeline does.

        Args:
            network: Network of the family.
            latents: ``(B, C, ...)`` canonical latents.
            sigma: ``(B,)`` noise levels, float32.
            conditioning: Encoded prompts, B rows.
            guidance: ``guidance_scale`` for networks that take it as an input.
        """

    def token_grid(self, latents: Tensor) -> tuple[int, ...]:
        """Return the numbers of tokens of latents ``(B, C, ..., h, w)`` along time, where there is one, and sides."""
        return *latents.shape[2:-2], *(side // self.packing for side in latents.shape[-2:])

    def pack(self, latents: Tensor) -> Tensor:
        """Join :attr:`packing`² pixels of latents ``(B, C, ..., h, w)`` to tokens ``(B, N, C·packing²)``, row by row.

        The features of a token have the order (c, dy, dx).
        """
        return F.pixel_unshuffle(latents.movedim(1, -3), self.packing).movedim(-3, -1).flatten(1, -2)

    def sequence(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the tokens ``(B, N, C·packing²)`` of canonical latents, followed by those of the sources in order."""
        packed = [self.pack(one) for one in (latents, *conditioning.source_latents)]
        return torch.cat(packed, dim=1) if len(packed) > 1 else packed[0]

    def grids(self, latents: Tensor, conditioning: Conditioning) -> list[tuple[int, ...]]:
        """Return the token grids of canonical latents and of the sources, in the order of :meth:`sequence`."""
        return [self.token_grid(one) for one in (latents, *conditioning.source_latents)]

    def unpack(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Undo :meth:`pack`; ``grid`` is that of :meth:`token_grid`. Tokens after those of the grid are left out."""
        made = tokens[:, : math.prod(grid)].unflatten(1, tuple(grid))
        return F.pixel_shuffle(made.movedim(-1, -3), self.packing).movedim(-3, 1)

    def blocks(self, network: Any) -> Iterator[nn.Module]:
        for name in self.lists:
            yield from getattr(network, name)

    # Features

    def split(self, number: int, found: Any, visual: int, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Return the visual tokens ``(B, N, D)`` and the text tokens ``(B, L, D)`` of what a block returns.

        The default is for blocks that return text and image, or joint tokens of the text and then of the image.

        Args:
            number: Number of the block, from 1 over all lists. For 0, ``found`` is what the first block takes, text
                before the image where it takes them apart.
            found: What the block returns. With :attr:`constant_text`, the text and what the block returns.
            visual: Number N of visual tokens: those of the picture that is made, then of its sources.
            conditioning: Encoded prompts, B rows.
        """
        text, image = found if isinstance(found, tuple) else found.tensor_split([found.shape[1] - visual], dim=1)
        return image, text

    @contextmanager
    def exact_times(self, network: Any, sigma: Tensor) -> Iterator[None]:
        """Let the network make sinusoids of ``sigma`` in float32 in the next pass, by :attr:`sinusoids`."""
        if self.sinusoids is None:
            yield
            return
        name, factor = self.sinusoids

        def exact(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            hook.remove()  # the next call may be that of the guidance
            return F.pad(factor * sigma, (0, len(inputs[0]) - len(sigma))), *inputs[1:]  # zeros: times of sources

        with network.get_submodule(name).register_forward_pre_hook(exact) as hook:
            yield

    def temb(self, *found: Any) -> Tensor:
        """Return the timestep embedding ``(B, E)`` from the outputs of :attr:`time_embedding`; the last one's last."""
        embedding: Tensor = found[-1] if isinstance(found[-1], Tensor) else found[-1][-1]
        return embedding

    @property
    def width(self) -> int:
        """Number of features of a token of the image."""
        heads, width = (self.entry(self.part, f, int) for f in ("num_attention_heads", "attention_head_dim"))
        return heads * width

    @property
    def text_width(self) -> int:
        """Number of features of a text token between blocks; the default is that of a token of the image."""
        return self.width

    @property
    def temb_dim(self) -> int:
        """Number of features of the timestep embedding; the default is that of a token."""
        return self.width

    def grid(self, network_size: tuple[int, int]) -> tuple[int, ...]:
        """Return the token grid of an image of (height, width) pixels."""
        time = () if self.latent_space.frame_downscale is None else (1,)
        return *time, *(side // self.side_multiple for side in network_size)

    def unread(self, number: int, visual: bool, text: bool) -> tuple[str, ...]:
        """Return the names of submodules of block ``number`` that its tokens, if read as given, do not depend on."""
        names = *(() if text else self.text_output), *(() if visual else self.visual_output)
        # Blocks of a later list take text and picture together, and have submodules of the same names.
        joint = names and len(self.lists) > 1 and number > self.dual_blocks
        return () if joint else names

    def unread_outside(self, number: int, visual: bool, text: bool) -> tuple[str, ...]:
        """Return names of modules and weights outside blocks that taps up to block ``number`` do not depend on."""
        return () if number else (*self.modulation, *(() if text else self.text_input))
