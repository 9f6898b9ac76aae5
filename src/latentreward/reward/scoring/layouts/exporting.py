"""Writing of a reward model in the layout of one of the two papers, for use with their authors' code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latentreward.core.checkpoints.base_weights import without_adapters
from latentreward.core.checkpoints.shards import require_finite
from latentreward.core.errors import InputError
from latentreward.core.storage.durable import replacing
from latentreward.diffusion import SD3DiTBackbone, SDUNetBackbone
from latentreward.diffusion.backbones.loading import PipelineSource
from latentreward.diffusion.families.sd import unet_family
from latentreward.reward.heads.clip_projection import CLIPProjectionHead
from latentreward.reward.heads.gated_qformer import GatedQFormerHead, LogisticSquash
from latentreward.reward.scoring.files import ADAPTER, adapter_settings, lora_layers, write_adapter
from latentreward.reward.scoring.layouts.model_folder import adapters_of
from latentreward.reward.scoring.layouts.papers import DINA_ADAPTER
from latentreward.reward.scoring.layouts.recipe import ModelRecipe
from latentreward.reward.scoring.layouts.saving import write_tensors
from latentreward.reward.scoring.network import RewardNetwork, name_of

RewardFormat = Literal["diffusion-rm", "lpo"]
OF_THE_BASE = {"revision": None, "variant": None, "vae_dtype": "float32"}
"""Settings of the base that the layouts do not hold → the values that they have after a layout is loaded."""


def export_reward(model: RewardNetwork, folder: Path, layout: RewardFormat, base_name: str | None = None) -> list[str]:
    """Write ``model`` in float32 in one of the two layouts.

    The folder is written under a temporary name and renamed when it is complete.

    Args:
        model: Model that was loaded from files in float32.
        folder: Folder to write; an existing one is replaced.
        layout: ``diffusion-rm`` is the layout of ``liuhuohuo/DiNa-LRM-SD35M-12layers``: ``config.json``,
            ``checkpoint/backbone_lora/`` and ``checkpoint/rm_head.pt``. ``lpo`` is the layout of ``casiatao/LRM``:
            ``unet/``, ``text_encoder/`` (SDXL: ``text_encoder_2/`` too) and ``state_dict.pt``; LoRA adapters are merged
            into the weights.
        base_name: Name of the base in ``config.json`` of ``diffusion-rm``, e.g. a hub id; None takes the hub id, or the
            last part of a local path.

    Returns:
        Lines for the user: flags with which the folder gives equal scores, and settings that the layout does not hold.

    Raises:
        InputError: If the layout cannot hold the model, or the model was not loaded from files in float32.
    """
    recipe = model.recipe
    if recipe is None or model.dtype != torch.float32:
        raise InputError("only a model that RewardModel.from_pretrained loaded in float32 can be exported; load it so")
    for problem in (lpo_problems if layout == "lpo" else diffusion_rm_problems)(model, recipe):
        raise InputError(f"format={layout} cannot hold this reward: {problem}")
    require_finite(dict(model.named_parameters()), "the reward model")
    base = base_of(model, recipe)
    head: Any = model.head
    with replacing(folder) as partial:
        if layout == "lpo":
            write_lpo(model, base, partial)
            unheld, settings = OF_THE_BASE, {"guidance": head.guidance, "multi_scale": head.multi_scale}
        else:
            write_diffusion_rm(model, base_name or name_of(base.source), partial)
            unheld = {**OF_THE_BASE, "frozen_dtype": "float32"}
            encoder: Any = model.backbone.text_encoder
            length = recipe.backbone.init_args.get("t5_length") if encoder is None else encoder.t5_length
            settings = {"rms_eps": head.norm_ff.eps, "t5_length": 256 if length is None else length}
    flags = [f"--base {quote(base.source)}", *(f"--published.{name} {value}" for name, value in settings.items())]
    lost = [*not_held(model, recipe.backbone.init_args, unheld)]
    return [f"load it with {' '.join(flags)}", *([f"not held by this layout: {'; '.join(lost)}"] if lost else [])]


def base_of(model: RewardNetwork, recipe: ModelRecipe) -> PipelineSource:
    """Return the base pipeline that the model was loaded on; raise InputError if it was loaded without one."""
    settings = recipe.backbone.init_args
    source = settings.get("source") or model.backbone.source
    if not source:
        raise InputError("the reward was loaded without its base, which the export needs; give base")
    return PipelineSource(source, settings.get("revision"), settings.get("variant"))


def not_held(model: RewardNetwork, settings: Mapping[str, Any], unheld: Mapping[str, Any]) -> Iterator[str]:
    """Yield a text for each setting of the model that the layout does not hold and that differs after loading."""
    default = RewardNetwork(model.backbone, model.head)
    if model.noise != default.noise:
        yield f"noise {model.noise} (will be {default.noise})"
    if model.image_sizes != default.image_sizes:
        yield f"image sizes {model.image_sizes} (will be {default.image_sizes})"
    if model.exif == "apply":
        yield "EXIF orientation applied (will be ignored; `latentreward score` takes --exif apply)"
    if model.calibration is not None:
        yield "the calibration"
    for name, later in unheld.items():
        if (value := settings.get(name, later)) != later:
            yield f"{name} {value} of the base"


def of_other_classes(model: RewardNetwork, backbone: type, head: type) -> str | None:
    """Return a text if the model's backbone or head is of another class than the layout holds, else None."""
    if type(model.backbone) is backbone and type(model.head) is head:
        return None
    found = f"{type(model.head).__name__} on {type(model.backbone).__name__}"
    return f"it takes a {head.__name__} on {backbone.__name__}, and this is a {found}"


def diffusion_rm_problems(model: RewardNetwork, recipe: ModelRecipe) -> Iterator[str]:
    """Yield a text for each property of the model that the layout of DiNa-LRM cannot hold."""
    backbone: Any = model.backbone
    head: Any = model.head
    if problem := of_other_classes(model, SD3DiTBackbone, GatedQFormerHead):
        yield problem
        return
    trained = (*recipe.own, *(f"LoRA of {part}" for part in adapters_of(backbone)))
    if trained != ("LoRA of transformer",):
        yield f"it takes a head and the LoRA of transformer, and here that is {', '.join(trained) or 'the head alone'}"
    if not backbone.text_taps:
        yield "the authors' code reads the text tokens of one block at least, and this reads none"
    if backbone.pooled_text != "clip":
        yield f"it takes pooled_text clip, and here that is {backbone.pooled_text}"
    if head.grid not in ("smallest", "largest"):
        yield f"it joins visual tokens on their own grid, and here grid is {head.grid}"
    if head.ensemble != "tokens":
        yield f"it joins noise levels by tokens, and here ensemble is {head.ensemble}"
    if head.logistic is not None:
        initial, trains = LogisticSquash().state_dict(), head.logistic.state_dict()
        if any(not torch.equal(value.cpu(), initial[name]) for name, value in trains.items()):
            yield "it does not hold eta3 and eta4 of use_logistic, and here they were trained"
    encoder = backbone.text_encoder
    if encoder is not None and encoder.text_encoder_3 is None and base_of(model, recipe).has("text_encoder_3"):
        yield "it takes the base's T5, and here load_t5 is false"


def lpo_problems(model: RewardNetwork, recipe: ModelRecipe) -> Iterator[str]:
    """Yield a text for each property of the model that the layout of LRM cannot hold."""
    backbone: Any = model.backbone
    head: Any = model.head
    if problem := of_other_classes(model, SDUNetBackbone, CLIPProjectionHead):
        yield problem
        return
    trained = {*recipe.own, *(part.partition(".")[0] for part in adapters_of(backbone))}
    if foreign := sorted(trained - {"unet", "text_encoder"}):
        yield f"it takes a U-Net and text encoders, and here {foreign[0]} was trained too"
    if backbone.sources[1]:
        yield "its U-Net makes pictures from text, and here it edits pictures"
    if [*backbone.visual_taps] != [*range(1, len(backbone.unet.down_blocks) + 2)]:
        yield f"it reads all down blocks and the mid block, and here visual_taps is {[*backbone.visual_taps]}"
    xl, projects = unet_family(backbone.unet.config) == "SDXL", isinstance(head.text_projection, nn.Linear)
    if projects == xl:
        families = "SDXL it has no" if xl else "SD1.5 and SD2.1 it has a"
        yield f"on {families} projection of the text, and here project_text is {str(projects).lower()}"
    if head.multi_scale == "enhanced" and head.needs_uncond and head.enhance_first == xl:
        yield f"the authors' multi_scale_cfg means another enhance_first than {head.enhance_first} on this base"


def write_diffusion_rm(model: RewardNetwork, base: str, folder: Path) -> None:
    """Write the layout of DiNa-LRM into ``folder``; ``base`` is the name of the base in its configs."""
    write_adapter(model.backbone.get_submodule("transformer"), folder / DINA_ADAPTER, base)
    state = model.head.state_dict().items()
    held = {name: tensor.detach().cpu() for name, tensor in state if not name.startswith("logistic.")}
    torch.save(held, folder / "checkpoint" / "rm_head.pt")
    (folder / "config.json").write_text(json.dumps(diffusion_rm_config(model, base), indent=4) + "\n")


def diffusion_rm_config(model: RewardNetwork, base: str) -> dict[str, Any]:
    """Return the contents of ``config.json`` in DiNa-LRM's layout; unknown settings of the training are None."""
    backbone: Any = model.backbone
    head: Any = model.head
    lora = adapter_settings(backbone.transformer, base)
    return {
        "model": {
            "model_type": None,
            "backbone_model_id": base,
            "num_transformer_layers": len(backbone.transformer.transformer_blocks),
            "freeze_backbone": False,
            "use_ema": None,
            "ema_decay": None,
            "use_lora": True,
            "use_text_features": True,
            "lora_config": {"r": lora["r"], "lora_alpha": lora["lora_alpha"], "init_lora_weights": "gaussian"},
            "use_logistic": head.logistic is not None,
            "visual_head_idx": list(backbone.visual_taps),
            "text_head_idx": list(backbone.text_taps),
            "use_t_embed": True,
            "reward_head": {
                "use_proj_in": hasattr(head.layer_adapters_visual[0], "proj_in"),
                "width": head.query_tokens.shape[-1],
                "out_dim": head.head.out_features,
                "num_queries": head.query_tokens.shape[1],
                "num_attn_heads": head.attn1.num_heads,
                "dropout": head.token_dropout.p,
            },
        },
        "training": {
            "mixed_precision": None,
            "learning_rate": None,
            "add_noise": True,
            "t_weighting_scheme": None,
            "t_weighting_scheme_param": None,
            "max_grad_norm": None,
            "use_vae": False,
        },
    }


def write_lpo(model: RewardNetwork, base: PipelineSource, folder: Path) -> None:
    """Write the layout of LRM into ``folder``; the U-Net's up path, which rewards do not keep, comes from ``base``."""
    backbone: Any = model.backbone
    head: Any = model.head
    unet = base.unet()
    unet.load_state_dict(merged_weights(backbone.unet), strict=False)
    config = {name: value for name, value in base.config("unet").items() if name != "_name_or_path"}
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tensors(unet.state_dict().items(), folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, encoder in backbone.text_encoder.named_children():
        encoder.config.save_pretrained(folder / name)
        # The authors' code needs the prefix text_model. and position_ids, which newer versions of transformers leave
        # out of CLIPTextModel; every version loads names with the prefix.
        state = {"text_model.embeddings.position_ids": torch.arange(encoder.config.max_position_embeddings)[None]}
        for key, tensor in merged_weights(encoder).items():
            state[key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"] = tensor
        write_tensors(state.items(), folder / name / "model.safetensors")
    parts = ["visual_projection", *(["text_projection"] if isinstance(head.text_projection, nn.Linear) else [])]
    projections = {part: head.get_submodule(part).state_dict() for part in parts}
    torch.save({**projections, "logit_scale": head.logit_scale.item()}, folder / "state_dict.pt")


def merged_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights of ``network`` in float32 with its LoRA adapter merged, by their names without the adapter."""
    state = {name: tensor.detach().cpu().float() for name, tensor in without_adapters(network.state_dict().items())}
    for name, layer in lora_layers(network).items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight(ADAPTER).detach().cpu().float()
    return state
