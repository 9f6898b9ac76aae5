"""Configs of the published pipelines, copied from the hub, and functions that write them as pipeline folders.

Only fields that set shapes are kept; diffusers and transformers fill in defaults. The folders have no weights. Their
tokenizers are stand-ins with the published vocabulary size.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer, GemmaTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer, T5TokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from latentreward.families import families
from latentreward.families.published import CLIP_L, T5_XXL

SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35_MEDIUM = {
    "sample_size": 128,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD3_MEDIUM = {**SD35_MEDIUM, "pos_embed_max_size": 192, "dual_attention_layers": (), "qk_norm": None}
SD35_LARGE = {
    **SD3_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
SD21 = {
    **SD15,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
CLIP_G = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
CLIP_H = {
    **CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
CLIP_H_VISION = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_V_PREDICTION = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", **_BETAS}
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
_SD3_PARTS: dict[str, Mapping[str, Any]] = {
    "vae": {**_VAE, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False},
    "scheduler": _FLOW,
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_G,
    "text_encoder_3": T5_XXL,
}
PIPELINES: dict[str, dict[str, Mapping[str, Any]]] = {
    "sd15": {
        "unet": {"_class_name": "UNet2DConditionModel", **SD15},
        "vae": {**_VAE, "latent_channels": 4, "scaling_factor": 0.18215},
        "scheduler": {"_class_name": "PNDMScheduler", **_BETAS},
        "text_encoder": CLIP_L,
    },
    "sd21": {
        "unet": {"_class_name": "UNet2DConditionModel", **SD21},
        "vae": {**_VAE, "latent_channels": 4, "scaling_factor": 0.18215},
        "scheduler": _V_PREDICTION,
        "text_encoder": {**CLIP_H, "num_hidden_layers": 23},  # Stability AI left out the last layer
    },
    "sd21_base": {
        "unet": {"_class_name": "UNet2DConditionModel", **SD21, "sample_size": 64},
        "vae": {**_VAE, "latent_channels": 4, "scaling_factor": 0.18215},
        "scheduler": {"_class_name": "PNDMScheduler", **_BETAS},
        "text_encoder": {**CLIP_H, "num_hidden_layers": 23},
    },
    "sdxl": {
        "unet": {"_class_name": "UNet2DConditionModel", **SDXL},
        "vae": {**_VAE, "latent_channels": 4, "scaling_factor": 0.13025},
        "scheduler": {"_class_name": "EulerDiscreteScheduler", **_BETAS},
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
    },
    "sd3": {"transformer": {"_class_name": "SD3Transformer2DModel", **SD3_MEDIUM}, **_SD3_PARTS},
    "sd35": {"transformer": {"_class_name": "SD3Transformer2DModel", **SD35_MEDIUM}, **_SD3_PARTS},
    "sd35_large": {"transformer": {"_class_name": "SD3Transformer2DModel", **SD35_LARGE}, **_SD3_PARTS},
}
"""Family of pipelines → part of the pipeline → content of the part's config.json."""
CLIP_MODELS: dict[str, dict[str, Any]] = {
    "clip_l": {"model_type": "clip", "projection_dim": 768, "text_config": CLIP_L},
    "clip_h": {"model_type": "clip", "projection_dim": 1024, "text_config": CLIP_H, "vision_config": CLIP_H_VISION},
}
"""Name → content of config.json, for CLIP models outside of pipelines."""
HUB_IDS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2-1-base": "sd21_base",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
    "stabilityai/stable-diffusion-3.5-medium": "sd35",
    "stabilityai/stable-diffusion-3.5-large": "sd35_large",
    "openai/clip-vit-large-patch14": "clip_l",
    "yuvalkirstain/PickScore_v1": "clip_h",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "clip_h",
}
"""Hub id from which configs were copied → key of :data:`PIPELINES` or :data:`CLIP_MODELS`."""


INDICES: dict[str, Mapping[str, Any]] = {}
"""Key of :data:`PIPELINES` → entries of its ``model_index.json`` besides the parts."""
for _one in (one for kind in families().values() for one in kind.published):
    _name = _one.model.rpartition("/")[2].lower()
    PIPELINES[_name], HUB_IDS[_one.model], INDICES[_name] = dict(_one.parts), _name, _one.index


def write_pipelines(
    root: Path, pipelines: Mapping[str, Mapping[str, Any]] = PIPELINES, clip_models: Iterable[str] = CLIP_MODELS
) -> dict[str, str]:
    """Write folders of pipelines and CLIP models in the layout of the hub, without weights.

    Returns:
        Name → path of its folder.
    """
    made: dict[str, Path] = {}

    def tokenizer(kind: str) -> Path:
        """Return the folder of a stand-in, written at the first call: its files take a second."""
        if kind not in made:
            made[kind] = root / f"{kind}_tokenizer"
            TOKENIZERS[kind][1]().save_pretrained(made[kind])
        return made[kind]

    for name, parts in pipelines.items():
        index: dict[str, Any] = {"_class_name": "DiffusionPipeline", **INDICES.get(name, {})}
        for part, config in parts.items():
            index[part] = ["library", "class"]  # loaders check only whether the part is listed
            write_json(root / name / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), config)
            if part.startswith("text_encoder"):
                kind = config["model_type"]
                place = part.replace("text_encoder", "tokenizer")
                index[place] = ["transformers", TOKENIZERS[kind][0]]
                shutil.copytree(tokenizer(kind), root / name / place)
        if "batch_norm_eps" in parts.get("vae", {}):
            mean, variance = (
                value.clone() for value in torch.tensor([0.0, 1.0], device="cpu").repeat(128, 1).unbind(1)
            )
            norm = {"bn.running_mean": mean, "bn.running_var": variance}  # part of the latent space
            save_file(norm, root / name / "vae" / "diffusion_pytorch_model.safetensors")
        write_json(root / name / "model_index.json", index)
    for name in clip_models:
        shutil.copytree(tokenizer("clip_text_model"), root / name)
        write_json(root / name / "config.json", CLIP_MODELS[name])
        write_json(root / name / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"})
    return {name: str(root / name) for name in [*pipelines, *clip_models]}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` to a JSON file; missing parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def clip_tokenizer() -> CLIPTokenizer:
    """Make a stand-in for CLIP's tokenizer: equal vocabulary size, single characters as words, fillers as the rest."""
    symbols = list(bytes_to_unicode().values())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    words += [f"<filler {number}>" for number in range(CLIP_L["vocab_size"] - len(words) - 2)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77)


def t5_tokenizer(size: int = 32100) -> T5TokenizerFast:
    """Make a stand-in for T5's tokenizer: ``size`` tokens, single characters as words, fillers as the rest."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    pieces += [(chr(code), -2.0) for code in range(33, 127)]
    pieces += [(f"<filler {number}>", -9.0) for number in range(size - len(pieces))]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def umt5_tokenizer() -> T5TokenizerFast:
    """Make a stand-in for UMT5's tokenizer, as :func:`t5_tokenizer`."""
    return t5_tokenizer(256300)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Make a stand-in for Qwen's tokenizer: equal vocabulary size, bytes as words, and a chat template of its form."""
    symbols = list(bytes_to_unicode().values())
    words = [*symbols, *(f"<filler {number}>" for number in range(151643 - len(symbols)))]
    tokenizer = Qwen2Tokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma_tokenizer() -> GemmaTokenizer:
    """Make a stand-in for Gemma's tokenizer: equal vocabulary size, single characters as words, fillers as the rest."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *map(chr, range(33, 127))]
    words += [f"<filler {number}>" for number in range(256000 - len(words) - 1)]
    return GemmaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Chat template in the form of Qwen3's."""
TOKENIZERS: dict[str, tuple[str, Callable[[], PreTrainedTokenizerBase]]] = {
    "clip_text_model": ("CLIPTokenizer", clip_tokenizer),
    "t5": ("T5TokenizerFast", t5_tokenizer),
    "umt5": ("T5TokenizerFast", umt5_tokenizer),
    "qwen3": ("Qwen2Tokenizer", qwen_tokenizer),
    "qwen2_5_vl": ("Qwen2Tokenizer", qwen_tokenizer),
    "gemma2": ("GemmaTokenizer", gemma_tokenizer),
}
"""``model_type`` of a text encoder → class of its tokenizer in ``model_index.json``, and function that makes it."""
