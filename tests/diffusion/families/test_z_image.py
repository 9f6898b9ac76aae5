"""Facts of Z-Image that the tests of all families cannot see."""

import pytest
import torch

from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.diffusion import find_family
from latentreward.diffusion.families.z_image import ZImage, ZImagePromptEncoder, lengths_of
from latentreward.diffusion.noise.schedules import EULER
from tests.diffusion.families.made_configs import MadeConfigs
from tests.diffusion.families.qwen3 import qwen, qwen_tokenizer
from tests.diffusion.families.twins import PROMPTS, TWINS, noise_for


def family(shift: float = 6.0, **network: object) -> ZImage:
    twin = TWINS["z_image"].source().pipeline()
    configs = {"transformer": twin.config("transformer") | network, "vae": twin.config("vae")}
    configs["scheduler"] = {"_class_name": EULER, "shift": shift}
    found = find_family(MadeConfigs(configs, _class_name="ZImagePipeline"))
    assert isinstance(found, ZImage)
    return found


def test_base_and_turbo_are_told_by_the_shift() -> None:
    base, turbo, other = family(6.0), family(3.0), family(5.0)
    assert (base.model, turbo.model, other.model) == ("Z-Image", "Z-Image-Turbo", "Z-Image")
    assert [one.guidance(None) for one in (base, turbo, other)] == [5.0, None, 5.0]
    assert [one.guidance(0.0) for one in (base, turbo)] == [0.0, 0.0]
    assert [one.needs_uncond(scale) for one in (base, turbo) for scale in (None, 0.0)] == [False] * 4
    assert base.needs_uncond(1.0)
    assert "shift is 3 " in str(turbo.assumption())
    with pytest.raises(InputError, match=r"guidance_scale=4, but Z-Image-Turbo was distilled .* or set it to null"):
        turbo.guidance(4.0)
    with pytest.raises(InputError, match="guidance_scale=-1 must be at least 0, which switches guidance"):
        base.guidance(-1.0)


def test_omni_is_refused() -> None:
    with pytest.raises(InputError, match="is a Z-Image-Omni, which takes images"):
        family(siglip_feat_dim=1152)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_come_first_whatever_the_padding_side(side: str) -> None:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(padding_side=side)
    model = qwen(tokenizer).eval()
    encoder = ZImagePromptEncoder(model, tokenizer, 24)
    long = "a very long prompt " * 3
    texts = [encoder.text(prompt) for prompt in ("a cat", long)]
    assert texts[0] == "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer(texts, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    (ids,) = encoder.tokenize(["a cat", long])
    lengths = [len(tokenizer(texts[0]).input_ids), 24]
    assert lengths[0] < 24
    with torch.no_grad():
        encoded = encoder.encode_ids(ids)
        want = model(**whole).last_hidden_state
    assert lengths_of(encoded) == lengths
    for row, length in enumerate(lengths):
        assert encoded.prompt_mask[row, :length].all()
        mask = whole.attention_mask[row].bool()
        torch.testing.assert_close(encoded.prompt_embeds[row, :length], want[row, mask], rtol=0, atol=1e-5)


def test_a_tokenizer_without_chat_template_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = TWINS["z_image"].source().resolve_family()
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = None
    monkeypatch.setattr(one.pipeline, "tokenizer", lambda part: tokenizer)
    with pytest.raises(InputError, match="tokenizer has no chat template, with which Z-Image encodes prompts"):
        one.load_prompt_encoder()
    for template in ("{% if %}", "{{ raise_exception('no') }}", "{{ messages[7].content.text }}"):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=r"has a chat template that cannot be rendered .*; download tokenizer"):
            one.chat_tokenizer()


@pytest.mark.parametrize("size", [(32, 48), (128, 64)])  # 6 and 32 tokens: with padding of the image, and without
def test_padding_of_image_and_caption_is_outside_the_text_mask(size: tuple[int, int]) -> None:
    twin = TWINS["z_image"]
    backbone = create_backbone("z_image", source=twin.folder, visual_taps=[0, 2], text_taps=[2], tuning="frozen").eval()
    latents = noise_for(backbone.family.latent_shape(*size))
    conditioning = backbone.encode_prompts(PROMPTS)
    assert [length > 32 for length in lengths_of(conditioning)] == [False, True]
    features = backbone(latents, torch.tensor([300.0, 800.0]), conditioning)
    assert features.text_mask.sum(dim=1).tolist() == lengths_of(conditioning)
    assert features.text[0].shape[:2] == features.text_mask.shape
    assert features.text_mask.shape[1] == max(lengths_of(conditioning))
