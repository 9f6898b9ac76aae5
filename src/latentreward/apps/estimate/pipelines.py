"""Functions that write the configs of published pipelines, of ``published.yaml``, as pipeline folders.

Only fields that set shapes are kept; diffusers and transformers fill in defaults. The folders have no weights. Their
tokenizers are stand-ins with the published vocabulary size.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import CLIPTokenizer, GemmaTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer, T5TokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_CONTENT = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
SHARED: Mapping[str, Mapping[str, Any]] = _CONTENT["shared"]
"""Name of a part that several pipelines have → content of the part's config."""
PUBLISHED: Mapping[str, Mapping[str, Any]] = _CONTENT["pipelines"]
"""Short name of a published pipeline → hub id, parts, and entries of ``model_index.json`` besides the parts."""
CLIP_MODELS: dict[str, dict[str, Any]] = _CONTENT["clip_models"]
"""Name → content of config.json, for CLIP models outside of pipelines."""
HUB_IDS = {
    **{one["model"]: key for key, one in PUBLISHED.items()},
    "openai/clip-vit-large-patch14": "clip_l",
    "yuvalkirstain/PickScore_v1": "clip_h",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "clip_h",
}
"""Hub id from which configs were copied → key of :data:`PIPELINES` or :data:`CLIP_MODELS`."""
PIPELINES: dict[str, Mapping[str, Mapping[str, Any]]] = {key: one["parts"] for key, one in PUBLISHED.items()}
"""Short name of a published pipeline → part of the pipeline → content of the part's config.json."""


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
        index: dict[str, Any] = {"_class_name": "DiffusionPipeline"}
        index |= PUBLISHED.get(name, {}).get("index", {})
        for part, config in parts.items():
            index[part] = ["library", "class"]  # loaders check only whether the part is listed
            file = {"scheduler": "scheduler_config", "processor": "preprocessor_config"}.get(part, "config")
            write_json(root / name / part / f"{file}.json", config)
            if part.startswith("text_encoder"):
                kind = config["model_type"]
                place = part.replace("text_encoder", "tokenizer")
                index[place] = ["transformers", TOKENIZERS[kind][0]]
                shutil.copytree(tokenizer(kind), root / name / place)
        if "batch_norm_eps" in parts.get("vae", {}):
            mean, variance = torch.zeros(128, device="cpu"), torch.ones(128, device="cpu")
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


def filled(words: Sequence[str], size: int) -> dict[str, int]:
    """Return a vocabulary of ``size`` words: those given, and fillers as the rest."""
    return {word: number for number, word in enumerate([*words, *(f"<filler {n}>" for n in range(size - len(words)))])}


def clip_tokenizer() -> CLIPTokenizer:
    """Make a stand-in for CLIP's tokenizer: single characters as words."""
    symbols, size = bytes_to_unicode().values(), SHARED["clip_l"]["vocab_size"]
    vocab = filled([*symbols, *(f"{symbol}</w>" for symbol in symbols)], size - 2)
    vocab |= {"<|startoftext|>": size - 2, "<|endoftext|>": size - 1}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_tokenizer(size: int = 32100) -> T5TokenizerFast:
    """Make a stand-in for T5's tokenizer: single characters as words."""
    known = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -1.0} | dict.fromkeys(map(chr, range(33, 127)), -2.0)
    return T5TokenizerFast(vocab=[(word, known.get(word, -9.0)) for word in filled([*known], size)], extra_ids=0)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Make a stand-in for Qwen's tokenizer: bytes as words, and a chat template of its form."""
    tokenizer = Qwen2Tokenizer(vocab=filled([*bytes_to_unicode().values()], 151643), merges=[])
    kinds = [f"{kind}_{end}" for kind in ("object_ref", "box", "quad", "vision") for end in ("start", "end")]
    special = [f"<|{name}|>" for name in ("im_start", "im_end", *kinds, "vision_pad", "image_pad")]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma_tokenizer() -> GemmaTokenizer:
    """Make a stand-in for Gemma's tokenizer: single characters as words."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *map(chr, range(33, 127))]
    return GemmaTokenizer(vocab=filled(words, 256000 - 1), merges=[])


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if message.content is string else message.content[0].text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Chat template in the form of Qwen3's."""
TOKENIZERS: dict[str, tuple[str, Callable[[], PreTrainedTokenizerBase]]] = {
    "clip_text_model": ("CLIPTokenizer", clip_tokenizer),
    "t5": ("T5TokenizerFast", t5_tokenizer),
    "umt5": ("T5TokenizerFast", partial(t5_tokenizer, 256300)),
    "qwen3": ("Qwen2Tokenizer", qwen_tokenizer),
    "qwen2_5_vl": ("Qwen2Tokenizer", qwen_tokenizer),
    "qwen3_vl": ("Qwen2Tokenizer", qwen_tokenizer),
    "gemma2": ("GemmaTokenizer", gemma_tokenizer),
    "mistral3": ("T5TokenizerFast", partial(t5_tokenizer, 131072)),
}
"""``model_type`` of a text encoder → class of its tokenizer in ``model_index.json``, and function that makes it."""
