"""Facts of Z-Image that the tests of all families cannot see."""

import pytest

from latentreward.core.errors import InputError
from latentreward.diffusion import Family, find_family
from latentreward.diffusion.noise.schedules import EULER
from tests.diffusion.families.made_configs import MadeConfigs
from tests.diffusion.families.qwen3 import qwen_tokenizer
from tests.diffusion.families.twins import TWINS


def family(shift: float) -> Family:
    twin = TWINS["z_image"].source().pipeline()
    configs = {part: twin.config(part) for part in ("transformer", "vae")}
    configs["scheduler"] = {"_class_name": EULER, "shift": shift}
    return find_family(MadeConfigs(configs, _class_name="ZImagePipeline"))


def test_base_and_turbo_are_told_by_the_shift() -> None:
    assert [family(shift).model for shift in (6.0, 3.0, 5.0)] == ["Z-Image", "Z-Image-Turbo", "Z-Image"]
    assert "shift is 3 " in str(family(3.0).assumption())


def test_a_tokenizer_without_chat_template_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = TWINS["z_image"].source().resolve_family()
    tokenizer = qwen_tokenizer()
    monkeypatch.setattr(one.pipeline, "tokenizer", lambda part: tokenizer)
    for template in (None, "{% if %}", "{{ raise_exception('no') }}", "{{ messages[7].content.text }}"):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=r"has no chat template that can be rendered .*, with which Z-Image"):
            one.chat_tokenizer()
