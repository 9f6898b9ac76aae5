"""Facts of Wan 2.1 that sampling one image does not show: refusals, UniPC, text, types of weights, kohya's names."""

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.diffusion import ContinuousFlow, find_family
from latentreward.diffusion.families.wan21 import Wan21, cleaned
from tests.diffusion.families.made_configs import MadeConfigs
from tests.diffusion.families.made_wan21 import transformer, unipc, vae
from tests.diffusion.families.twins import PROMPTS, TWINS, noise_for


def configs(scheduler: Any = None, index: dict[str, Any] | None = None, **network: Any) -> MadeConfigs:
    scheduler = scheduler or unipc()
    parts = {
        "transformer": {**transformer().config, "_class_name": "WanTransformer3DModel", **network},
        "vae": dict(vae().config),
        "scheduler": {**scheduler.config, "_class_name": type(scheduler).__name__},
    }
    return MadeConfigs(parts, _class_name="WanPipeline", **(index or {}))


def test_other_networks_are_refused_by_name() -> None:
    assert isinstance(find_family(configs()), Wan21)
    for index, key in (({"boundary_ratio": 0.875}, "two networks"), ({"expand_timesteps": True}, "TI2V 5B")):
        with pytest.raises(InputError, match=key):
            find_family(configs(index=index))


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_levels_and_whole_timesteps_are_unipcs(shift: float) -> None:
    scheduler = unipc(flow_shift=shift)
    family = Wan21(configs(scheduler))
    for steps in (1, 3, 4, 6, 9, 20, 37, 50, 111):
        scheduler.set_timesteps(steps)
        timesteps, sigmas = family.levels(steps, (16, 1, 60, 104))
        torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=0, atol=1.1e-6)
        torch.testing.assert_close(timesteps, 1000 * sigmas[:-1])
        assert sigmas[-1] == 0
        assert torch.equal(family.clock(timesteps / 1000).long(), scheduler.timesteps)


def test_a_whole_timestep_of_a_window_or_an_evaluation_stays_one() -> None:
    timesteps = torch.arange(1.0, 1001.0)
    assert torch.equal(Wan21(configs(unipc())).clock(ContinuousFlow().sigma(timesteps)), timesteps)


def test_text_is_cleaned_as_in_the_pipeline_and_zero_after_the_prompt() -> None:
    twin = TWINS["wan21"]
    pipeline, encoder = twin.pipeline(), twin.source().load().text_encoder
    assert encoder is not None and encoder.num_tokens == 512
    prompts = ["  a &amp;amp; b \n\t c  ", "a cat", ""]
    with torch.no_grad():
        want, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
        found = encoder(prompts)
    assert cleaned(prompts[0]) == "a & b c"
    assert found.prompt_mask is None
    torch.testing.assert_close(found.prompt_embeds, want, rtol=0, atol=1e-6)
    assert [(row != 0).any(dim=1).sum().item() for row in found.prompt_embeds] == [9, 7, 1]
    short = twin.source(t5_length=5).load().text_encoder
    assert short is not None and short(prompts).prompt_embeds.shape[1] == 5
    with pytest.raises(InputError, match="load_t5=false"):
        twin.source(load_t5=False).load()


def test_the_same_weights_stay_float32_as_in_diffusers() -> None:
    twin = TWINS["wan21"]
    network = WanTransformer3DModel.from_pretrained(
        twin.folder, subfolder="transformer", torch_dtype=torch.bfloat16
    ).eval()
    want = {name: weight.dtype for name, weight in network.named_parameters()}
    assert {*want.values()} == {torch.float32, torch.bfloat16}
    policy = twin.source(frozen_dtype="bfloat16").load()
    backbone = create_backbone("wan21", source=twin.folder, visual_taps=(1,), text_taps=(), frozen_dtype="bfloat16")
    found, kept = (
        {n.replace(".base_layer", ""): one.dtype for n, one in network.named_parameters() if "lora" not in n}
        for network in (policy.network, backbone.transformer)
    )
    assert found == want and kept == {name: want[name] for name in kept} and len({*kept.values()}) == 2
    latents, prompts = noise_for((16, 1, 4, 6)), policy.encode_prompts(PROMPTS)
    with torch.no_grad():
        ours = policy.predict(latents, torch.tensor([300.0, 800.0]), prompts)
        theirs = network(latents.bfloat16(), torch.tensor([300, 800]), prompts.prompt_embeds.bfloat16()).sample
    assert torch.equal(ours, theirs)


def test_text_taps_are_the_embedded_text() -> None:
    twin = TWINS["wan21"]
    backbone = create_backbone("wan21", source=twin.folder, visual_taps=(1, 3), text_taps=(0, 2), tuning="frozen")
    prompts = backbone.encode_prompts(PROMPTS)
    with torch.no_grad():
        features = backbone(noise_for((16, 1, 4, 6)), torch.tensor([300.0, 800.0]), prompts)
        want = backbone.transformer.condition_embedder.text_embedder(prompts.prompt_embeds)
    assert torch.equal(features.text[0], want) and torch.equal(features.text[1], want)
    assert features.visual_grids[0] == (1, 2, 3)
    with pytest.raises(InputError, match=r"text_taps=\[3\] lie after the last of visual_taps"):
        create_backbone("wan21", source=twin.folder, visual_taps=(1, 2), text_taps=(3,))


def test_kohyas_names_of_layers_outside_the_blocks() -> None:
    pair = torch.zeros(1, 1), torch.zeros(1, 1)
    layers = {
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "proj_out": "head.head",
        "patch_embedding": "patch_embedding",
    }
    assert [*Wan21(configs()).kohya_layers(dict.fromkeys(layers, pair))] == [*layers.values()]
