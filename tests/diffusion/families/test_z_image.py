"""Facts of Z-Image that the tests of all families cannot see."""

import pytest

from latentreward.core.errors import InputError
from latentreward.diffusion import find_family
from latentreward.diffusion.families.z_image import ZImage
from latentreward.diffusion.noise.schedules import EULER
from tests.diffusion.families.made_configs import MadeConfigs
from tests.diffusion.families.qwen3 import qwen_tokenizer
from tests.diffusion.families.twins import TWINS


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


def test_a_tokenizer_without_chat_template_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = TWINS["z_image"].source().resolve_family()
    tokenizer = qwen_tokenizer()
    monkeypatch.setattr(one.pipeline, "tokenizer", lambda part: tokenizer)
    for template in (None, "{% if %}", "{{ raise_exception('no') }}", "{{ messages[7].content.text }}"):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=r"has no chat template that can be rendered .*, with which Z-Image"):
            one.chat_tokenizer()
