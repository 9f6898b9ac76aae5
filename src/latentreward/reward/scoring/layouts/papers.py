"""Loading of the two papers' published checkpoints (LRM and DiNa-LRM) in their authors' layouts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from latentreward.core.contracts import LatentSpace
from latentreward.core.errors import InputError, errors_at
from latentreward.core.storage.json_files import checked, read_config
from latentreward.diffusion import DDPM, DiffusionBackbone, SD3DiTBackbone, SDUNetBackbone
from latentreward.diffusion.backbones.loading import PipelineSource
from latentreward.diffusion.backbones.weights import load_weights, map_model, settle
from latentreward.diffusion.families.sd import unet_family
from latentreward.reward.heads.base import RewardHead
from latentreward.reward.heads.clip_projection import CLIPProjectionHead, MultiScale
from latentreward.reward.heads.gated_qformer import GatedQFormerHead
from latentreward.reward.scoring.files import (
    existing_folder,
    fill_adapter,
    inject_adapter,
    load_exactly,
    not_dense,
    read_lora,
    read_tensors,
)
from latentreward.reward.scoring.layouts.base import Network, StoredReward
from latentreward.reward.scoring.layouts.recipe import ModelPart, ModelRecipe, build_errors, build_head, head_part

if TYPE_CHECKING:
    from latentreward.diffusion.encoders.prompts import PromptEncoder

PUBLISHED_RMS_EPS = 2.0**-7  # epsilon of the RMS norms with which DiNa-LRM's published weights were trained
DINA_ADAPTER = "checkpoint/backbone_lora"
OF_AUTHORS = ConfigDict(allow_inf_nan=False, extra="ignore")
"""Types are checked, and settings that no score depends on left alone."""
_SCHEDULER = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_FACTORIES = {"SD1.5": "sd15", "SD2.1": "sd21", "SDXL": "sdxl"}
_LATENT_SPACES = {
    "SD1.5": LatentSpace(channels=4, downscale=8, scaling_factor=0.18215),
    "SDXL": LatentSpace(channels=4, downscale=8, scaling_factor=0.13025),
    "SD3": LatentSpace(channels=16, downscale=8, scaling_factor=1.5305, shift_factor=0.0609),
}


@dataclass(frozen=True)
class PublishedSettings:
    """Settings of a published checkpoint that its files do not hold.

    Attributes:
        guidance: LRM: guidance g of visual feature enhancement, the authors' ``guidance_scale``; at 1 or below visual
            feature enhancement is off.
        multi_scale: LRM: see :class:`~latentreward.reward.CLIPProjectionHead`. The authors' ``multi_scale: False`` is
            ``single``, their ``multi_scale_cfg: True`` is ``enhanced``. None takes ``single`` if the width of the
            stored projection is that of the mid block alone, and ``plain`` otherwise.
        rms_eps: DiNa-LRM: epsilon of the head's RMS norms. The published weights were trained with 2⁻⁷; the authors'
            code computes with 1.19e-7 under newer PyTorch.
        t5_length: DiNa-LRM: number of T5 tokens per prompt; 256 in the published example, 128 in training.
    """

    guidance: float = 7.5
    multi_scale: MultiScale | None = None
    rms_eps: float = PUBLISHED_RMS_EPS
    t5_length: int = 256


class PublishedLayout(StoredReward):
    """Base class of the two papers' layouts, on ``base``, a pipeline's folder or hub id."""

    takes: tuple[str, ...] = ()  # names of the fields of PublishedSettings that apply to the layout
    used: dict[str, Any]  # settings in use that the files do not hold, once the head is loaded

    def __init__(self, folder: str | Path, base: str | None = None, settings: PublishedSettings | None = None) -> None:
        self.folder, self.base, self.settings = Path(folder), base, settings or PublishedSettings()
        for field in fields(PublishedSettings):
            value = getattr(self.settings, field.name)
            if field.name not in self.takes and value != field.default:
                other = f"{str(folder)!r}, whose layout takes {' and '.join(self.takes)}; leave it out"
                raise InputError(f"published.{field.name}={value!r} does not concern {other}")

    def load(self, kind: type[Network]) -> Network:
        with torch.random.fork_rng(devices=[]):  # initial values are random but overwritten
            backbone = self.backbone()
            model = kind(backbone, self.head(backbone))
        fill_adapter(backbone.get_submodule(backbone.network_name), self.adapter(backbone))
        model.published = self.used
        return self.finished(model, self.recipe)

    def report(self, **used: Any) -> None:
        """Note the settings in use that the files do not hold, and log a line with them."""
        self.used = used
        values = ", ".join(f"{name} {value}" for name, value in used.items())
        names = ", ".join(f"published.{name}" for name in used)
        message = "%s: scored with %s, which its files do not hold; set %s for others"
        logging.getLogger(__name__).warning(message, self.folder, values, names)


class PublishedLRM(PublishedLayout):
    """Stored reward in the layout of ``casiatao/LRM``.

    Tokenizers and VAE come from ``base``; without a ``base`` the model has none, or the tokenizers of a policy that it
    judges. A text encoder that was frozen in training is not in the files and comes from ``base`` too.
    """

    takes = ("guidance", "multi_scale")
    shareable = False  # the whole U-Net was trained
    judged: PipelineSource | None = None  # pipeline of the policy that the model judges, if of the same family

    def latent_space(self) -> LatentSpace:
        existing_folder(self.folder, "unet/config.json")
        if self.base is not None:
            return self._pipeline().latent_space()
        return _LATENT_SPACES["SDXL" if self._family == "SDXL" else "SD1.5"]

    @cached_property
    def _family(self) -> str:
        return unet_family(read_config(self.folder / "unet" / "config.json"))

    def complete_from(self, pipeline: PipelineSource) -> None:
        if pipeline.has("unet") and unet_family(pipeline.config("unet")) == self._family:
            self.judged = pipeline

    def _pipeline(self) -> PipelineSource:
        """Open the base pipeline, and check that its U-Net is of the checkpoint's model family."""
        pipeline = PipelineSource(self.base)
        if self._family != (found := unet_family(pipeline.config("unet"))):
            other = f"the checkpoint {str(self.folder)!r} is an {self._family} one; give an {self._family} base"
            raise InputError(f"base={pipeline.source!r} is a {found} pipeline, but {other}")
        return pipeline

    def backbone(self) -> SDUNetBackbone:
        from diffusers import UNet2DConditionModel

        folder = str(existing_folder(self.folder, "unet/config.json", "state_dict.pt"))
        source = None if self.base is None else self._pipeline()
        backbone = SDUNetBackbone(
            map_model(UNet2DConditionModel, folder, subfolder="unet"),
            DDPM.from_config(_SCHEDULER) if source is None else source.noise_process(),
            self.latent_space(),
            text_encoder=self._prompts(source),
            vae=None if source is None else source.latent_encoder(),
        )
        settle(backbone.unet, torch.float32)
        return backbone

    def head(self, backbone: DiffusionBackbone) -> RewardHead:
        path = self.folder / "state_dict.pt"
        state = lrm_head_state(read_tensors(path), path)
        spec, projects_text = backbone.feature_spec, "text_projection.weight" in state
        single, wanted = state["visual_projection.weight"].shape[-1] == spec.visual[-1].width, self.settings.multi_scale
        if wanted is not None and (wanted == "single") != single:
            read = "the mid block alone" if single else "more than the mid block"
            raise InputError(
                f"multi_scale={wanted!r} does not fit {path}, whose visual_projection reads {read}; leave it out or "
                f"give {'single' if single else 'plain or enhanced'}"
            )
        self.report(guidance=self.settings.guidance, multi_scale=wanted or ("single" if single else "plain"))
        settings = {
            **self.used,
            "enhance_first": self._family != "SDXL",
            "embed_dim": len(state["visual_projection.weight"]) if projects_text else None,
            "project_text": projects_text,
        }
        head = build_head(ModelPart(CLIPProjectionHead.__name__, settings), spec, stored=state)
        load_exactly(head, state, path)
        stores_text = (self.folder / "text_encoder").exists()
        tuning = {"tuning": "full", "text_encoder_tuning": "full" if stores_text else "frozen"}
        self.recipe = ModelRecipe(
            ModelPart(_FACTORIES[self._family], {"source": self.base, **tuning}),
            head_part(head, settings),
            ("unet", "text_encoder") if stores_text else ("unet",),
        )
        return head

    def _prompts(self, source: PipelineSource | None) -> PromptEncoder:
        """Load the prompt encoder: the checkpoint's, or that of the base if it was frozen in training."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        from latentreward.diffusion.encoders.prompts import CLIPPromptEncoder, SDXLPromptEncoder

        parts = ("text_encoder", "text_encoder_2") if self._family == "SDXL" else ("text_encoder",)
        if not any((self.folder / part).exists() for part in parts):
            if source is None:
                frozen = "it was frozen in training and is that of the base; give the base as base"
                raise InputError(f"model folder {str(self.folder)!r} has no text_encoder/: {frozen}")
            return source.sdxl_prompts() if self._family == "SDXL" else source.clip_prompts()
        existing_folder(self.folder, *(f"{part}/config.json" for part in parts))
        names = [part.replace("text_encoder", "tokenizer") for part in parts]
        named = source or self.judged
        tokenizers = [None if named is None else named.tokenizer(name) for name in names]
        first = load_weights(CLIPTextModel, str(self.folder), subfolder="text_encoder")
        if self._family != "SDXL":
            return CLIPPromptEncoder(first, *tokenizers)
        second = load_weights(CLIPTextModelWithProjection, str(self.folder), subfolder="text_encoder_2")
        return SDXLPromptEncoder(first, second, *tokenizers)


def lrm_head_state(published: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Convert the contents of a published ``state_dict.pt`` to a state dict of :class:`CLIPProjectionHead`.

    The log temperature is a number in some published files and a tensor in others.
    """
    unknown = sorted(set(published) - {"visual_projection", "text_projection", "logit_scale"})
    missing = [name for name in ("visual_projection", "logit_scale") if name not in published]
    if unknown or missing:
        name, kind = (missing or unknown)[0], "missing" if missing else "unexpected"
        raise InputError(f"cannot load {path}: {kind} entry {name}; is this an LRM state_dict.pt?")
    parts = {part: published[part] for part in ("visual_projection", "text_projection") if part in published}
    for part, entries in parts.items():
        if not isinstance(entries, Mapping) or "weight" not in entries:
            raise InputError(f"cannot load {path}: missing tensor {part}.weight; is this an LRM state_dict.pt?")
    state = {f"{part}.{name}": tensor for part, entries in parts.items() for name, tensor in entries.items()}
    with build_errors(f"cannot load {path}: logit_scale: "):
        state["logit_scale"] = torch.as_tensor(published["logit_scale"], dtype=torch.float32).reshape(1)
    for name, tensor in state.items():
        if not_dense({name: tensor}) or (name.endswith(".weight") and tensor.ndim != 2):
            raise InputError(f"cannot load {path}: {name} is not a dense matrix; download it again")
    return state


@dataclass(frozen=True, kw_only=True)
class DiNaHead:
    """Section ``model.reward_head`` of DiNa-LRM's ``config.json``."""

    __pydantic_config__ = OF_AUTHORS
    width: int
    num_queries: int
    num_attn_heads: int
    out_dim: int
    use_proj_in: bool
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DiNaSettings:
    """Section ``model`` of DiNa-LRM's ``config.json``, as far as a score depends on it."""

    __pydantic_config__ = OF_AUTHORS
    backbone_model_id: str
    num_transformer_layers: int
    visual_head_idx: Sequence[int]
    text_head_idx: Sequence[int]
    reward_head: DiNaHead
    use_logistic: bool = False
    use_t_embed: Literal[True] = True
    use_lora: Literal[True] = True


class PublishedDiNaLRM(PublishedLayout):
    """Stored reward in the layout of ``liuhuohuo/DiNa-LRM-SD35M-12layers``.

    Without ``base``, the pipeline that ``config.json`` names is loaded.
    """

    takes = ("rms_eps", "t5_length")

    @cached_property
    def _config(self) -> DiNaSettings:
        existing_folder(self.folder, "config.json")
        return model_section(self.folder / "config.json")

    @cached_property
    def _pipeline(self) -> PipelineSource:
        return PipelineSource(self.base or self._config.backbone_model_id)

    def latent_space(self) -> LatentSpace:
        existing_folder(self.folder, "config.json")
        return self._pipeline.latent_space() if self._pipeline.has("vae") else _LATENT_SPACES["SD3"]

    def adapter(self, backbone: DiffusionBackbone) -> dict[str, Tensor]:
        return read_lora(self.folder / DINA_ADAPTER, backbone.get_submodule(backbone.network_name))

    def same_base(self, part: str, weights: Mapping[str, Tensor], source: str) -> bool:
        return self.on_meta_device.source == source

    def _taps(self) -> dict[str, Any]:
        """Return the backbone's settings on blocks to keep and taps to read.

        The authors' ``use_text_features`` is not needed here: their network reads the text tokens of ``text_head_idx``
        whatever its value. It only decides whether the text side of the last block has LoRA, which
        ``adapter_config.json`` states.
        """
        config = self._config
        taps = {"visual_taps": config.visual_head_idx, "text_taps": config.text_head_idx}
        return {"num_layers": config.num_transformer_layers, **taps}

    def backbone(self) -> SD3DiTBackbone:
        from diffusers import SD3Transformer2DModel

        existing_folder(self.folder, "config.json", "checkpoint/rm_head.pt")
        source = self._pipeline
        complete = source.has("text_encoder")
        with build_errors(f"{self.folder / 'config.json'} on {source}: "):
            token_dim = source.config("transformer")["joint_attention_dim"]
            backbone = SD3DiTBackbone(
                source.load(SD3Transformer2DModel, "transformer"),
                source.noise_process(),
                self.latent_space(),
                **self._taps(),
                text_encoder=source.sd3_prompts(token_dim, self.settings.t5_length) if complete else None,
                vae=source.latent_encoder() if source.has("vae") else None,
            )
        backbone.source = str(source)
        inject_adapter(backbone.transformer, self.folder / DINA_ADAPTER)
        settle(backbone.transformer, torch.float32)
        return backbone.requires_grad_(False)

    def head(self, backbone: DiffusionBackbone) -> RewardHead:
        path, options = self.folder / "checkpoint" / "rm_head.pt", self._config.reward_head
        part = ModelPart(
            GatedQFormerHead.__name__,
            {
                "width": None if options.width in (-1, 0) else options.width,
                "num_queries": options.num_queries,
                "num_heads": options.num_attn_heads,
                "out_dim": options.out_dim,
                "use_proj_in": options.use_proj_in,
                "rms_eps": self.settings.rms_eps,
                "dropout": options.dropout,
                "use_logistic": self._config.use_logistic,
            },
        )
        self.report(rms_eps=self.settings.rms_eps, t5_length=self.settings.t5_length)
        state = read_tensors(path)
        if name := not_dense(state):
            raise InputError(f"cannot load {path}: {name} is not a dense tensor; download it again")
        with errors_at(f"{self.folder / 'config.json'}: model.reward_"):
            head = build_head(part, backbone.feature_spec, stored=state)
        load_exactly(head, state, path, absent_by_design=("logistic.eta3", "logistic.eta4"))
        normalised = bool(self._pipeline.config("transformer").get("qk_norm"))
        length = self.settings.t5_length
        settings = {"source": self._pipeline.source, "t5_length": length, "tuning": "frozen", **self._taps()}
        self.recipe = ModelRecipe(ModelPart("sd35_medium" if normalised else "sd3_medium", settings), part)
        return head


def model_section(path: Path) -> DiNaSettings:
    """Read the section ``model`` of a ``config.json``."""
    remedy = "is this a DiNa-LRM checkpoint? Download it again"
    return checked(DiNaSettings, read_config(path).get("model", {}), f"{path}: model", remedy)
