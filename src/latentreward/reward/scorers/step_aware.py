"""SPO's step-aware preference model: CLIP with a vision tower modulated by the timestep, its scorer and weights.

Architecture: arXiv:2406.04314 and its released code. Each vision block, and the pooled feature, is modulated by the
timestep as in DiT (adaLN, arXiv:2212.09748). The modulation is initialised to the identity, so that training starts
from the embeddings of any CLIP checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from torch.utils.checkpoint import checkpoint

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError
from latentreward.data.images import to_pixels
from latentreward.reward.scorers.clip import PICKSCORE, CLIPImageScorer, default_processor, load_clip, model_source
from latentreward.reward.scoring.files import load_exactly, read_state_dict

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

STEP_FILE = "step_aware.safetensors"  # file in a CLIP folder with the weights that StepAwareCLIP adds to CLIP
FREQUENCIES = 256  # width of the sinusoidal embedding of a timestep
PUBLISHED_NAMES = (
    (r"(?:model\.)?t_embedder\.mlp\.", "time_embedder."),
    (r"(?:model\.)?vision_model\.encoder\.layers\.(\d+)\.adaLN_modulation\.", r"layer_modulation.\1."),
    (r"(?:model\.)?vision_model\.adaLN_modulation\.", "final_modulation."),
    (r"(?:model\.)?((?:text_|vision_)model\.|(?:text|visual)_projection\.|logit_scale)", r"clip.\1"),
)
"""Pattern of the beginning of a tensor's name in SPO's released file, and the beginning in :class:`StepAwareCLIP`."""


class StepAwareCLIP(nn.Module):
    """A CLIP model of any size with a vision tower modulated by the timestep."""

    gradient_checkpointing: bool = False  # recompute vision blocks in the backward pass, to save memory
    mean: Tensor  # ``(3,)``, of the model's image preprocessing
    std: Tensor  # ``(3,)``

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.clip, self.tokenizer = clip, tokenizer
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        width = clip.config.vision_config.hidden_size
        self.time_embedder = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.layer_modulation = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)) for _ in clip.vision_model.encoder.layers
        )
        self.final_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        for linear in (self.time_embedder[0], self.time_embedder[2]):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        # The modulation starts as the identity: shifts and scales 0, gates 1 at every timestep.
        linears = [modulation.get_submodule("1") for modulation in (*self.layer_modulation, self.final_modulation)]
        for linear in linears:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in linears[:-1]:
            for gate in linear.bias.detach().chunk(6)[2::3]:
                gate.fill_(1.0)

    def embed_images(self, pixels: Tensor, timesteps: Tensor) -> Tensor:
        """Return embeddings ``(B, width)``, float32, of norm 1, of images ``(B, 3, H, W)``, about [-1, 1].

        ``timesteps`` ``(B,)`` are those at which the images were predicted; 0 for finished images.
        """
        vision = self.clip.vision_model
        pixels = prepare_pixels(pixels, vision.config.image_size, self.mean, self.std)
        time = self.time_embedder(embed_timesteps(timesteps).to(self.time_embedder[0].weight.dtype))
        hidden = vision.pre_layrnorm(vision.embeddings(pixels.to(vision.pre_layrnorm.weight.dtype)))
        for layer, modulation in zip(vision.encoder.layers, self.layer_modulation, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(modulated_layer, layer, hidden, modulation(time), use_reentrant=False)
            else:
                hidden = modulated_layer(layer, hidden, modulation(time))
        shift, scale = self.final_modulation(time).chunk(2, dim=-1)
        pooled = vision.post_layernorm(hidden[:, 0]) * (1 + scale) + shift
        return normalize(self.clip.visual_projection(pooled).float(), dim=-1)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids ``(B, length)`` on the CPU; long prompts are truncated."""
        length = self.clip.config.text_config.max_position_embeddings
        return self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Return prompt embeddings ``(B, width)``, float32, of norm 1, for IDs ``(B, length)`` from :meth:`tokenize`.

        Padding needs no mask: attention is causal, and the embedding is read at the end token.
        """
        pooled = self.clip.text_model(input_ids=input_ids.to(self.mean.device)).pooler_output
        return normalize(self.clip.text_projection(pooled).float(), dim=-1)

    def similarity(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Return the scores ``exp(logit_scale) · cos`` ``(B,)``, float32, of B pairs of embeddings of norm 1."""
        return self.clip.logit_scale.float().exp() * (image_embeds * text_embeds).sum(dim=-1)

    def save(self, folder: Path) -> None:
        """Save the CLIP model in transformers' layout, and the added weights beside it as :data:`STEP_FILE`.

        Other programs can read the folder as a CLIP model without timestep.
        """
        from transformers import CLIPImageProcessorPil

        self.clip.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        size = self.clip.config.vision_config.image_size
        CLIPImageProcessorPil(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=self.mean.tolist(),
            image_std=self.std.tolist(),
        ).save_pretrained(folder)
        step = {name: value.contiguous() for name, value in self.state_dict().items() if not name.startswith("clip.")}
        save_file(step, folder / STEP_FILE)


def modulated_layer(layer: nn.Module, hidden: Tensor, modulation: Tensor) -> Tensor:
    """Apply a CLIP vision block with adaLN modulation to ``hidden`` ``(B, N, width)``; the shape stays.

    ``modulation`` ``(B, 6·width)`` holds shifts, scales and gates of attention and MLP.
    """
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.unsqueeze(1).chunk(6, dim=-1)
    attended, _ = layer.self_attn(hidden_states=layer.layer_norm1(hidden) * (1 + scale) + shift, attention_mask=None)
    hidden = hidden + gate * attended
    return hidden + mlp_gate * layer.mlp(layer.layer_norm2(hidden) * (1 + mlp_scale) + mlp_shift)


def embed_timesteps(timesteps: Tensor) -> Tensor:
    """Return sinusoidal embeddings ``(B, 256)``, float32: cosines, then sines, at frequencies from 1 to 1/10000."""
    from diffusers.models.embeddings import get_timestep_embedding  # 0.6 s of imports that `fit --help` can spare

    return get_timestep_embedding(timesteps, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)


def prepare_pixels(images: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Convert decoded pixels to the vision tower's input ``(B, 3, size, size)``; differentiable.

    The shorter side of ``images`` ``(B, 3, H, W)``, about [-1, 1], is resized to ``size`` pixels (bicubic without
    antialiasing), and the centre square is cropped. ``mean`` and ``std`` ``(3,)`` are those of CLIP's preprocessing.

    Note:
        SPO preprocesses images in this way when it scores them. When SPO trains its preference model, it resizes both
        sides to ``size`` instead and also clamps before resizing; on square images only that clamp differs.
    """
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    resized = (int(height * scale + 0.5), int(width * scale + 0.5))
    images = interpolate(images.float(), resized, mode="bicubic", align_corners=False)
    top, left = (round((side - size) / 2) for side in resized)
    images = (images[..., top : top + size, left : left + size] / 2 + 0.5).clamp(0, 1)
    return (images - mean.to(images)[:, None, None]) / std.to(images)[:, None, None]


def rename_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of SPO's file to those of :class:`StepAwareCLIP`; raise InputError if a name is unknown."""
    renamed = {}
    for name, value in tensors.items():
        matches = ((re.match(pattern, name), new) for pattern, new in PUBLISHED_NAMES)
        match, new = next((found for found in matches if found[0]), (None, ""))
        if match is None:
            raise InputError(f"weights: tensor {name!r} is none of a step-aware CLIP; give the file that SPO released")
        renamed[match.expand(new) + name[match.end() :]] = value
    return {name: value for name, value in renamed.items() if not name.endswith(".position_ids")}


class StepAwareScorer(CLIPImageScorer):
    """SPO's step-aware preference model (arXiv:2406.04314), a CLIP model that also gets the timestep.

    As the scorer of a ``PixelReward`` the model scores the image that a policy predicts at a timestep. As a scorer of
    images the model gets timestep 0, which stands for finished images.

    Args:
        source: Folder or hub id of the CLIP model that training started from, or ``spm_tiny``, a tiny trained model
            shipped with the package.
        weights: Trained weights: a checkpoint of ``StepAwarePixelModule``, or the file that SPO released. Not needed if
            ``source`` is a folder with ``step_aware.safetensors``.
        name: Name of the scores in tables.
        options: See :class:`~latentreward.reward.scorers.clip.CLIPImageScorer`. A ``PixelReward`` ignores ``device``
            and uses the device of the policy.
    """

    def __init__(
        self, source: PathText = PICKSCORE, *, weights: PathText | None = None, name: str = "step_aware", **options: Any
    ) -> None:
        super().__init__(name, source, **options)
        self.weights = weights

    def identity(self) -> str:
        return f"{super().identity()} weights {self.weights}"

    def load(self) -> StepAwareCLIP:
        """Load the network, frozen, on the CPU."""
        network, trained = load_step_aware(self.source, self.processor, self.revision, self.weights)
        if not (trained or network.mean.is_meta):  # which has shapes alone
            remedy = "train one with configs/model/spm_sd15.yaml, and give its checkpoint as weights"
            raise InputError(f"source {self.source!r} of {self.name} is a CLIP model that knows no timestep; {remedy}")
        return network.to(getattr(torch, self.dtype)).eval().requires_grad_(False)

    def prepare(self) -> None:
        """Load the network."""
        self._network  # noqa: B018

    @cached_property
    def _network(self) -> StepAwareCLIP:
        return self.load().to(self.device)

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        network, finished = self._network, torch.zeros(1, device=self.device)
        pixels = (to_pixels(image.convert("RGB"))[None].to(self.device) for image in images)
        embeds = torch.cat([network.embed_images(one, finished) for one in pixels])
        return network.similarity(embeds, network.embed_tokens(network.tokenize(prompts)))


def load_step_aware(
    source: str, processor: str | None = None, revision: str | None = None, weights: str | None = None
) -> tuple[StepAwareCLIP, bool]:
    """Load a step-aware CLIP model in float32, without gradients; under ``torch.device("meta")`` only its shapes.

    The file ``weights`` is loaded over the weights of ``source``: a checkpoint of ``StepAwarePixelModule``, the file
    that SPO released, or safetensors. Weights of CLIP that it lacks stay as they are. None takes
    ``step_aware.safetensors`` in the folder ``source``, if there is one.

    Returns:
        The network, and whether trained weights were loaded. Without them the timestep does not change the embeddings.
    """
    folder, processor = model_source(source), model_source(processor or default_processor(source))
    clip, tokenizer, preprocess = load_clip(folder, processor, revision, torch.float32)
    network = StepAwareCLIP(clip, tokenizer, preprocess.image_mean, preprocess.image_std)
    beside = Path(folder) / STEP_FILE
    file = beside if weights is None else Path(weights)
    if network.mean.is_meta or (weights is None and not beside.is_file()):
        return network.requires_grad_(False), False
    tensors, prefix = read_state_dict(file, "a step-aware model"), "network."
    trained = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if not trained:  # not a checkpoint of StepAwarePixelModule
        trained = tensors if file.suffix == ".safetensors" else rename_published(tensors)
    of_source = tuple(name for name in network.state_dict() if name.startswith("clip."))
    try:
        load_exactly(network, trained, file, absent_by_design=of_source)
    except InputError as error:
        raise InputError(f"{error}; give weights of a step-aware model that started from this source") from error
    return network.requires_grad_(False), True
