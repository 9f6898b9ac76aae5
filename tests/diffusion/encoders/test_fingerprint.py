"""Which encoders count as the same."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderDC
from torch import nn

from latentreward.diffusion.backbones.loading import PipelineSource
from latentreward.diffusion.encoders.fingerprint import text_fingerprint, vae_fingerprint
from latentreward.diffusion.encoders.vae import LatentEncoder
from tests.diffusion.families.twins import TWINS
from tests.tiny_pipelines import clip_tokenizer, pipeline_folder


@pytest.fixture
def encoder() -> LatentEncoder:
    return PipelineSource(pipeline_folder("sd15")).latent_encoder()


def test_vae_fingerprint_is_of_the_encoder_half(encoder: LatentEncoder) -> None:
    vae = encoder.vae
    before = vae_fingerprint(vae)
    assert before == vae_fingerprint(deepcopy(vae))
    vae.decoder.conv_in.weight.data.add_(1.0)
    vae.post_quant_conv.weight.data.add_(1.0)
    assert vae_fingerprint(vae) == before
    for part in (vae.encoder.conv_in.bias, vae.quant_conv.bias):
        part.data[0] += 1e-3
        assert vae_fingerprint(vae) != before
        part.data[0] -= 1e-3


def test_vae_fingerprint_tells_scale_and_precision(encoder: LatentEncoder) -> None:
    before = vae_fingerprint(encoder.vae)
    assert vae_fingerprint(deepcopy(encoder.vae).to(torch.bfloat16)) != before
    for setting in ("scaling_factor", "shift_factor"):
        other = deepcopy(encoder.vae)
        other.register_to_config(**{setting: 0.5})
        assert vae_fingerprint(other) != before


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35"])
def test_text_fingerprint_is_the_same_in_either_precision(name: str) -> None:
    pipeline = PipelineSource(pipeline_folder(name))
    make = {"sd15": pipeline.clip_prompts, "sdxl": pipeline.sdxl_prompts, "sd35": lambda: pipeline.sd3_prompts(48, 8)}
    encoder = make[name]()
    before = text_fingerprint(encoder)
    assert text_fingerprint(make[name]()) == before
    assert text_fingerprint(deepcopy(encoder).to(torch.bfloat16)) == before
    next(iter(encoder.text_encoder.parameters())).data.add_(1.0)
    assert text_fingerprint(encoder) != before


def test_text_fingerprint_tells_the_tokenizer_and_the_length() -> None:
    pipeline = PipelineSource(pipeline_folder("sd15"))
    encoder = pipeline.clip_prompts()
    before = text_fingerprint(encoder)
    encoder.tokenizer = clip_tokenizer()
    encoder.tokenizer.add_tokens(["dog"])
    assert text_fingerprint(encoder) != before
    sd3 = PipelineSource(pipeline_folder("sd35"))
    assert text_fingerprint(sd3.sd3_prompts(48, 8)) != text_fingerprint(sd3.sd3_prompts(48, 16))


def test_text_fingerprint_tells_the_template_of_a_language_model() -> None:
    encoder = TWINS["z_image"].source().resolve_family().load_prompt_encoder()
    before = text_fingerprint(encoder)
    encoder.tokenizer.chat_template = "be kind; " + encoder.tokenizer.chat_template
    assert text_fingerprint(encoder) != before


@pytest.mark.parametrize("name", ["flux2_klein", "lumina2", "z_image"])
def test_text_fingerprint_tells_the_side_of_the_padding(name: str) -> None:
    encoder = next(twin for twin in TWINS.values() if twin.family == name).source().resolve_family()
    loaded = encoder.load_prompt_encoder()
    before = text_fingerprint(loaded)
    loaded.tokenizer.padding_side = {"left": "right", "right": "left"}[loaded.tokenizer.padding_side]
    assert (text_fingerprint(loaded) != before) == (not loaded.masked)


class OwnVAE(nn.Module):
    """A VAE of one's own: parts with other names, a weight outside them, and a plain object as config."""

    def __init__(self) -> None:
        super().__init__()
        self.inwards, self.decoder = nn.Conv2d(3, 4, 2), nn.Conv2d(4, 3, 2)
        self.mean = nn.Parameter(torch.zeros(4))
        self.config = SimpleNamespace(scale=2.0)


def other_vae(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "own":
        return OwnVAE()
    side = {"block_out_channels": (8, 8), "block_types": "ResBlock", "layers_per_block": (1, 1)}
    sides = {f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in side.items()}
    scales = {f"{half}_qkv_multiscales": ((), ()) for half in ("encoder", "decoder")}
    return AutoencoderDC(latent_channels=4, attention_head_dim=4, **sides, **scales)


@pytest.mark.parametrize(
    ("name", "setting"),
    [("AutoencoderDC", "scaling_factor"), ("own", "scale")],
)
def test_vae_of_any_class_has_a_fingerprint_of_all_but_its_decoder(name: str, setting: str) -> None:
    vae = other_vae(name)
    before = vae_fingerprint(vae)
    assert len(before) == 32
    assert vae_fingerprint(other_vae(name)) == before
    next(vae.decoder.parameters()).data.add_(1.0)
    assert vae_fingerprint(vae) == before
    for weight in (one for part, one in vae.named_parameters() if not part.startswith("decoder")):
        weight.data.view(-1)[0] += 1.0
        assert vae_fingerprint(vae) != before
        weight.data.view(-1)[0] -= 1.0
    if name == "own":
        vae.config.scale = 3.0
    else:
        vae.register_to_config(**{setting: 3.0})
    assert vae_fingerprint(vae) != before
