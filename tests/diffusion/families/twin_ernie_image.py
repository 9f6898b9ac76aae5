"""Twin of ERNIE-Image."""

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Mistral3Config, Mistral3Model, PreTrainedTokenizerFast

from tests.diffusion.families.flux2_vae import CHANNELS, flux2_vae
from tests.diffusion.families.twins import Twin
from tests.tiny_pipelines import WIDTH


def mistral_tokenizer(**options: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters that puts a token before each text, as Mistral's."""
    words = ["<unk>", "<s>", "</s>", "<pad>", *map(chr, range(32, 127))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, **options)


def mistral(tokenizer: PreTrainedTokenizerFast) -> Mistral3Model:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2, "head_dim": 8}
    text = {**sizes, "model_type": "mistral", "num_hidden_layers": 3, "num_key_value_heads": 1,
            "vocab_size": len(tokenizer)}  # fmt: skip
    vision = {**sizes, "model_type": "pixtral", "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    return Mistral3Model(Mistral3Config(text_config=text, vision_config=vision))


def transformer() -> ErnieImageTransformer2DModel:
    network = ErnieImageTransformer2DModel(
        hidden_size=24, num_attention_heads=2, num_layers=4, ffn_hidden_size=32, in_channels=4 * CHANNELS,
        out_channels=4 * CHANNELS, text_in_dim=WIDTH, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    for layer in (network.adaLN_modulation[-1], network.final_linear):  # zeros at the start
        torch.nn.init.normal_(layer.weight, std=0.2)
    return network


def with_epsilon(pipeline: Any) -> None:
    """Give the VAE's batch norm the epsilon of its config: the pipeline decodes with 1e-5 whatever that says."""
    pipeline.vae.bn.running_var.add_(pipeline.vae.config.batch_norm_eps - 1e-5)


def pipeline() -> DiffusionPipeline:
    tokenizer = mistral_tokenizer()
    return ErnieImagePipeline(
        transformer=transformer(),
        vae=flux2_vae(),
        text_encoder=mistral(tokenizer),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
    )


TWINS = [Twin("ernie_image", "ernie_image", pipeline, backbone="ernie_image", mended=with_epsilon)]
