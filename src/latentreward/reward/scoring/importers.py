"""Importers of rewards that lie in another layout than a model folder: training checkpoints, and the papers' files.

Each ends in the form of :class:`~latentreward.reward.scoring.stored.StoredReward`; once loaded, any of them can be
saved as a model folder.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from pydantic import ConfigDict
from torch import Tensor

from latentreward.core.checkpoints.base_weights import BaseSample, problem_of_record, sample, without_adapters
from latentreward.core.checkpoints.shards import check_weights, damaged, read_checkpoint
from latentreward.core.contracts import LatentSpace
from latentreward.core.errors import InputError, errors_at, first_line
from latentreward.core.registry import backbone_names
from latentreward.core.settings.errors import leaves
from latentreward.core.settings.rewriting import check_yaml, rewrite_settings
from latentreward.core.storage.json_files import checked, read_config
from latentreward.data.image_sizes import ImageSizes
from latentreward.data.images import ExifOrientation
from latentreward.diffusion import DDPM, DiffusionBackbone, SD3DiTBackbone, SDUNetBackbone
from latentreward.diffusion.backbones.loading import PipelineSource
from latentreward.diffusion.backbones.tuning import check_settings
from latentreward.diffusion.backbones.weights import assign, load_weights, map_model, settle, settling_later
from latentreward.diffusion.families.sd import unet_family
from latentreward.reward.heads.base import RewardHead
from latentreward.reward.heads.clip_projection import CLIPProjectionHead
from latentreward.reward.heads.gated_qformer import GatedQFormerHead
from latentreward.reward.scoring.files import (
    PublishedSettings,
    existing_folder,
    inject_adapter,
    load_exactly,
    not_dense,
    read_lora,
    read_tensors,
    settings_beside,
)
from latentreward.reward.scoring.recipe import (
    ONLY_IN_TRAINING,
    REMEDY,
    SETTINGS,
    ModelPart,
    ModelRecipe,
    backbone_part,
    build_backbone,
    build_errors,
    build_head,
    check_class,
    head_part,
    is_ours,
    own_parts,
    registered_name,
)
from latentreward.reward.scoring.stored import StoredReward, sizes_of

if TYPE_CHECKING:
    from latentreward.diffusion.encoders.prompts import PromptEncoder
    from latentreward.reward.scoring.reward_model import RewardModel

PARTS = ("backbone", "head")  # names of the settings of a run that describe the reward model
OF_HEAD, OF_BACKBONE = "head.", "backbone."
"""Beginnings of the names of weights in a reward model."""


class TrainedReward(StoredReward):
    """Stored reward in a checkpoint of a reward's training run, together with the settings of the run.

    Of the settings only backbone and head are used. Weights that the checkpoint leaves out are loaded from the
    backbone's ``source``.

    Without the run's ``config`` the file is looked for beside the checkpoint and one folder up; then the settings are
    read that the checkpoint of a Python script without ``latentreward fit`` contains. ``average`` takes the weights
    that the callback ``TrainableEMA`` averaged, if the checkpoint has them. ``base`` is loaded in place of the pipeline
    that the settings name. ``trusted`` settings may name classes that are not registered, and contain ``${...}`` for
    OmegaConf to resolve; see :mod:`.recipe`.
    """

    recipe: ModelRecipe

    def __init__(
        self,
        checkpoint: Path,
        config: Path | None = None,
        average: bool = True,
        base: str | None = None,
        trusted: bool = False,
    ) -> None:
        self.checkpoint, self.average = checkpoint, average
        found = config or settings_beside(checkpoint)
        self.config = found or checkpoint
        settings = self._noted_settings() if found is None else model_settings(found, trusted)
        if base is not None:
            arguments = settings["backbone"]["init_args"]
            arguments |= {"source": base, **dict.fromkeys({"revision"} & arguments.keys())}
        parts: dict[str, ModelPart] = {}
        with errors_at(f"{self.config}: model."):
            for kind in PARTS:
                name = registered_name(kind, str(settings[kind].get("class_path")))
                parts[kind] = ModelPart(name, settings[kind]["init_args"])
                check_class(kind, parts[kind], trusted)
        self.recipe = ModelRecipe(**parts, training=settings["training"])

    @cached_property
    def _recorded(self) -> dict[str, Any]:
        """Entries of the checkpoint, read without its tensors' values."""
        return read_checkpoint(self.checkpoint, with_tensors=False)

    @cached_property
    def _content(self) -> dict[str, Any]:
        """Entries of the checkpoint, read once, after a comparison with its checksums."""
        content = read_checkpoint(self.checkpoint)
        if content.get("base") is not None and (problem := problem_of_record(content["base"])):
            raise InputError(damaged(self.checkpoint, f"base: {problem}"))
        return content

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        """Weights of the reward, by their names in it; InputError if the checkpoint is damaged, or not of a reward."""
        state, callbacks = dict(self._content["state_dict"]), self._content.get("callbacks")
        for callback in callbacks.values() if self.average and isinstance(callbacks, Mapping) else ():
            if isinstance(callback, Mapping) and isinstance(callback.get("average"), Mapping):
                updates = callback.get("updates")
                state |= callback["average"] if isinstance(updates, int) and updates else {}
        weights = {name: tensor for name, tensor in state.items() if str(name).startswith("model.")}
        if not any(name.startswith("model.head.") for name in weights):
            nothing = f"checkpoint {self.checkpoint} holds no weights of a reward (model.head.…)"
            raise InputError(f"{nothing}; give one that training of a reward wrote")
        if name := not_dense(weights):
            raise InputError(damaged(self.checkpoint, f"{name} is not a dense tensor"))
        return {name.removeprefix("model."): tensor for name, tensor in weights.items()}

    def _named(self, prefix: str) -> dict[str, Tensor]:
        """Return the weights whose names begin with ``prefix``, without it."""
        return {name.removeprefix(prefix): one for name, one in self._weights.items() if name.startswith(prefix)}

    def _noted(self, entry: str, kind: Any) -> Any:
        """Return what the checkpoint notes of its training's pictures; no tensor is read."""
        with errors_at(f"{self.checkpoint}: "):
            return checked(kind, self._recorded.get(entry), entry)

    exif = property(lambda self: self._noted("exif", ExifOrientation))  # type: ignore[assignment]
    edits = property(lambda self: self._noted("edits", bool | None))  # type: ignore[assignment]

    @property
    def image_sizes(self) -> ImageSizes | None:  # type: ignore[override]
        """Rule for image sizes that the checkpoint notes."""
        with errors_at(f"{self.checkpoint}: image_sizes: "):
            return sizes_of(self._recorded.get("image_sizes"))

    def _noted_settings(self) -> dict[str, Any]:
        """Read the settings from the checkpoint, in the form of :func:`model_settings`; no ``${...}`` is resolved."""
        if (noted := self._recorded.get(SETTINGS)) is None:
            remedy = "give the one of the reward's run as config, on the command line --run_config FILE"
            raise InputError(f"no config.yaml lies beside {self.checkpoint} or in the folder above it; {remedy}")
        try:
            parts = {p: {"class_path": noted[p]["class_path"], "init_args": dict(noted[p]["init_args"])} for p in PARTS}
            return json.loads(json.dumps({"training": dict(noted["training"]), **parts}))
        except (TypeError, LookupError, ValueError, RuntimeError, RecursionError) as error:
            place = f"{self.checkpoint}: {SETTINGS}"
            raise InputError(f"{place} is of another version ({first_line(error)})") from error

    def backbone(self) -> DiffusionBackbone:
        part = self.recipe.backbone
        if is_ours(part):  # attention backend and compilation were chosen for the machine of the run
            settings = {n: v for n, v in part.init_args.items() if n == "lora" or n not in ONLY_IN_TRAINING}
            part = ModelPart(part.name, settings)
        with errors_at(f"{self.config}: model."):
            return build_backbone(part)

    def head(self, backbone: DiffusionBackbone) -> RewardHead:
        stored = self._named(OF_HEAD)
        with errors_at(f"{self.config}: model."):
            head = build_head(self.recipe.head, backbone.feature_spec, stored=stored)
        load_exactly(head, stored, self.checkpoint)
        return head

    @contextmanager
    def reading(self) -> Iterator[None]:
        """See :meth:`StoredReward.reading`; LoRA settings of a stranger must fit the stored adapters first."""
        part, state = self.recipe.backbone, self._recorded["state_dict"]
        if is_ours(part) and isinstance(lora := part.init_args.get("lora"), Mapping) and "rank" in lora:
            stored = [len(tensor) for name, tensor in state.items() if ".lora_A." in str(name)]
            check_settings({"r": lora["rank"]}, stored, f"cannot load {self.config}")
        with settling_later():
            yield

    def fill(self, model: RewardModel) -> None:
        backbone, weights, recipe = model.backbone, self._weights, self.recipe
        backbone.drop_unread(model.head.reads_text, model.head.reads_temb)
        own = model.state_dict()
        with errors_at(f"{self.checkpoint} with {self.config}: "):
            check_weights(model, {name: tensor.shape for name, tensor in weights.items()})
            for name in weights.keys() & own.keys():
                if own[name].is_floating_point() and not weights[name].is_floating_point():
                    raise InputError(f"{name} is {weights[name].dtype}, expected floating point; get the file again")
            assign(model, weights)
            if (base := self._content.get("base")) is not None:
                BaseSample.of(torch.nn.ModuleDict({"model": model}), backbone.source).check(base)
        names = own_parts(backbone, recipe.backbone.init_args.get("pretrained") is False)  # before it is frozen
        steps = self._content.get("global_step")
        model.recipe = ModelRecipe(
            backbone_part(recipe.backbone.name, recipe.backbone.init_args, names),
            head_part(model.head, recipe.head.init_args),
            names,
            {**recipe.training, "steps": steps if type(steps) is int else None},
        )

    def adapter(self, backbone: DiffusionBackbone) -> dict[str, Tensor]:
        found = self._named(f"{OF_BACKBONE}{backbone.network_name}.")
        return {name: tensor for name, tensor in found.items() if ".lora_" in name}

    def base_values(self) -> Mapping[str, Tensor]:
        base, prefix = self._content.get("base"), f"model.{OF_BACKBONE}"
        values = dict(zip(base["names"], base["values"], strict=True)) if base is not None else {}
        values = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        values |= {name: sample(one) for name, one in self._named(OF_BACKBONE).items() if one.is_floating_point()}
        return dict(without_adapters(values.items()))


def model_settings(path: Path, trusted: bool = False) -> dict[str, Any]:
    """Read the settings of a reward from a run's ``config.yaml``, or from a file such as ``configs/model/*.yaml``.

    ``${...}`` in the settings of backbone and head is resolved if ``trusted``, otherwise refused: resolvers could read
    environment variables of this machine, and nested references could grow exponentially.

    ``backbone`` and ``head`` of the result hold ``class_path`` and ``init_args``; ``training`` holds the class paths
    ``module`` and ``data_module``, and as ``data`` the class of the reader of training pairs.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        check_yaml(text := path.read_text(encoding="utf-8"))
        run: Any = rewrite_settings(OmegaConf.to_container(OmegaConf.load(io.StringIO(text))), backbone_names())
        model = run.get("model")
        name = str(model.get("class_path") or "") if isinstance(model, dict) else ""
        arguments = (model.get("init_args") or {}) if name else {}
        given = {part: arguments[part] for part in PARTS if arguments.get(part)}
        if trusted:
            root = OmegaConf.create(run).model.init_args if given else {}
            given = {
                p: OmegaConf.to_container(root[p], resolve=True) if type(v) is dict else v for p, v in given.items()
            }
        for _, value in () if trusted else leaves(given):
            if isinstance(value, str) and "${" in value:
                raise InputError(f"{value!r} would be resolved on this machine; {REMEDY}")
        parts = {p: {"class_path": one} if isinstance(one, str) else one for p, one in given.items()}
        parts = {p: {**one, "init_args": dict(one.get("init_args") or {})} for p, one in parts.items()}
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, AttributeError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); give the config.yaml of a run") from error
    if "policy" in arguments:
        aligned = f"{name.rpartition('.')[2]}, which aligns a policy"
        raise InputError(f"{path} is of {aligned}; give a checkpoint that training of a reward wrote")
    if missing := [part for part in PARTS if part not in parts]:
        raise InputError(f"{path} names no model.init_args.{missing[0]}; give the config.yaml of a reward's run")
    data = run["data"] if isinstance(run.get("data"), Mapping) else {}
    options = data.get("init_args")
    reader = class_of(options.get("train")) if isinstance(options, Mapping) else None
    training = {"module": name, "data_module": data.get("class_path"), "data": reader or class_of(data)}
    return {"training": training, **parts}


def class_of(settings: Any) -> str | None:
    """Return the name of the class in a run's settings, without its package."""
    name = str(settings.get("class_path")).rpartition(".")[2] if isinstance(settings, Mapping) else ""
    return name if name.isidentifier() and name != "None" else None


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

    def fill(self, model: RewardModel) -> None:
        super().fill(model)
        model.published = self.used

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
        single = state["visual_projection.weight"].shape[-1] == spec.visual[-1].width
        scales = self.settings.multi_scale or ("single" if single else "plain")
        self.report(guidance=self.settings.guidance, multi_scale=scales)
        settings = {
            **self.used,
            "enhance_first": self._family != "SDXL",
            "embed_dim": len(state["visual_projection.weight"]) if projects_text else None,
            "project_text": projects_text,
        }
        head = build_head(ModelPart(CLIPProjectionHead.__name__, settings), spec, stored=state)
        load_exactly(head, state, path)
        own = ("unet", "text_encoder") if (self.folder / "text_encoder").exists() else ("unet",)
        tuning = {"tuning": "full", "text_encoder_tuning": "full" if "text_encoder" in own else "frozen"}
        backbone_part = ModelPart(_FACTORIES[self._family], {"source": self.base, **tuning})
        self.recipe = ModelRecipe(backbone_part, head_part(head, settings), own)
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
        named = source or self.judged
        tokenizers = [
            None if named is None else named.tokenizer(part.replace("text_encoder", "tokenizer")) for part in parts
        ]
        first = load_weights(CLIPTextModel, str(self.folder), subfolder="text_encoder")
        if self._family != "SDXL":
            return CLIPPromptEncoder(first, *tokenizers)
        second = load_weights(CLIPTextModelWithProjection, str(self.folder), subfolder="text_encoder_2")
        return SDXLPromptEncoder(first, second, *tokenizers)


def lrm_head_state(published: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Convert the contents of a published ``state_dict.pt`` to a state dict of :class:`CLIPProjectionHead`.

    The log temperature is a number in some published files and a tensor in others.
    """
    state: dict[str, Tensor] = {}
    for part, entries in published.items():
        named = entries if isinstance(entries, Mapping) else {"": entries}
        state |= {f"{part}.{name}".removesuffix("."): tensor for name, tensor in named.items()}
    for name in ("visual_projection.weight", "logit_scale"):
        if name not in state:
            raise InputError(f"cannot load {path}: missing tensor {name}; is this an LRM state_dict.pt?")
    with build_errors(f"cannot load {path}: logit_scale: "):
        state["logit_scale"] = torch.as_tensor(state["logit_scale"], dtype=torch.float32).reshape(1)
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
    """Section ``model`` of DiNa-LRM's ``config.json``, as far as a score depends on it.

    The authors' ``use_text_features`` is not needed: their network reads the text tokens of ``text_head_idx`` whatever
    its value. It only decides whether the text side of the last block has LoRA, which ``adapter_config.json`` states.
    """

    __pydantic_config__ = OF_AUTHORS
    backbone_model_id: str
    num_transformer_layers: int
    visual_head_idx: Sequence[int]
    text_head_idx: Sequence[int]
    reward_head: DiNaHead
    use_logistic: bool = False
    use_t_embed: Literal[True] = True
    use_lora: Literal[True] = True

    @property
    def taps(self) -> dict[str, Any]:
        """Settings of the backbone on blocks to keep and taps to read."""
        taps = {"visual_taps": self.visual_head_idx, "text_taps": self.text_head_idx}
        return {"num_layers": self.num_transformer_layers, **taps}


class PublishedDiNaLRM(PublishedLayout):
    """Stored reward in the layout of ``liuhuohuo/DiNa-LRM-SD35M-12layers``.

    Without ``base``, the pipeline that ``config.json`` names is loaded.
    """

    takes = ("rms_eps", "t5_length")

    @cached_property
    def _config(self) -> DiNaSettings:
        path = existing_folder(self.folder, "config.json") / "config.json"
        remedy = "is this a DiNa-LRM checkpoint? Download it again"
        return checked(DiNaSettings, read_config(path).get("model", {}), f"{path}: model", remedy)

    @cached_property
    def _pipeline(self) -> PipelineSource:
        return PipelineSource(self.base or self._config.backbone_model_id)

    def latent_space(self) -> LatentSpace:
        return self._pipeline.latent_space() if self._pipeline.has("vae") else _LATENT_SPACES["SD3"]

    def adapter(self, backbone: DiffusionBackbone) -> dict[str, Tensor]:
        return read_lora(self.folder / DINA_ADAPTER, backbone.get_submodule(backbone.network_name))

    def same_base(self, part: str, weights: Mapping[str, Tensor], source: str) -> bool:
        return self.on_meta_device.source == source

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
                **self._config.taps,
                text_encoder=source.sd3_prompts(token_dim, self.settings.t5_length) if complete else None,
                vae=source.latent_encoder() if source.has("vae") else None,
            )
        backbone.source = str(source)
        inject_adapter(backbone.transformer, self.folder / DINA_ADAPTER)
        settle(backbone.transformer, torch.float32)
        return backbone.requires_grad_(False)

    def head(self, backbone: DiffusionBackbone) -> RewardHead:
        path, options, length = self.folder / "checkpoint/rm_head.pt", self._config.reward_head, self.settings.t5_length
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
        self.report(rms_eps=self.settings.rms_eps, t5_length=length)
        state = read_tensors(path)
        if name := not_dense(state):
            raise InputError(f"cannot load {path}: {name} is not a dense tensor; download it again")
        with errors_at(f"{self.folder / 'config.json'}: model.reward_"):
            head = build_head(part, backbone.feature_spec, stored=state)
        load_exactly(head, state, path, absent_by_design=("logistic.eta3", "logistic.eta4"))
        name = "sd35_medium" if self._pipeline.config("transformer").get("qk_norm") else "sd3_medium"
        settings = {"source": self._pipeline.source, "t5_length": length, "tuning": "frozen", **self._config.taps}
        self.recipe = ModelRecipe(ModelPart(name, settings), part)
        return head
