"""A backbone whose ``read`` and ``feature_spec`` disagree is named with the tap, not by an error deep in the head."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from latentreward.core.contracts import Conditioning, Features, FeatureSpec, LatentSpace, TapSpec
from latentreward.core.errors import InputError
from latentreward.diffusion import (
    ContinuousFlow,
    FlowMatching,
    NoiseProcess,
    SDUNetBackbone,
    process_from_scheduler,
    sd_tiny,
)
from latentreward.diffusion.backbones.base import features_problem
from latentreward.diffusion.backbones.loading import PipelineSource, finish
from latentreward.reward import CLIPProjectionHead, LRMModule
from tests.tiny_pipelines import WIDTH, pipeline_folder, sd_unet

DDIM = {"_class_name": "DDIMScheduler"}
SPEC = FeatureSpec(visual=(TapSpec(8, (2, 3)),), text=(TapSpec(5, (4,)),), temb_dim=6, pooled_text_dim=7)
FEATURES = Features(
    visual=(torch.zeros(2, 6, 8),),
    visual_grids=((2, 3),),
    text=(torch.zeros(2, 4, 5),),
    pooled_text=torch.zeros(2, 7),
    temb=torch.zeros(2, 6),
)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"visual": (torch.zeros(2, 6, 9),)}, "visual tap 0 (2, 6, 9); it must be a tensor (2, 6, 8) as feature_spec"),
        ({"visual": ()}, "0 visual taps; it must be the 1 of feature_spec"),
        ({"visual_grids": ((3, 3),)}, "visual tap 0 (2, 6, 8); it must be a tensor (2, 9, 8)"),
        ({"visual_grids": ()}, "0 visual_grids; it must be one for each of 1 taps"),
        ({"text": (torch.zeros(2, 4, 6),)}, "text tap 0 (2, 4, 6); it must be a tensor (2, any, 5)"),
        ({"temb": torch.zeros(2, 1)}, "temb (2, 1); it must be a tensor (2, 6)"),
        ({"pooled_text": torch.zeros(1, 7)}, "pooled_text (1, 7); it must be a tensor (2, 7)"),
        ({"output": torch.zeros(2, 4, 6, 6)}, "an output map of 4 channels; it must be as feature_spec says, None"),
    ],
)
def test_what_differs_is_named(wrong: dict[str, object], message: str) -> None:
    assert features_problem(FEATURES, SPEC, rows=2) is None
    assert str(features_problem(replace(FEATURES, **wrong), SPEC, rows=2)).startswith(message)


def test_a_backbone_is_compared_when_it_first_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = sd_tiny(tuning="frozen")
    spec = backbone.feature_spec
    monkeypatch.setattr(type(backbone), "feature_spec", replace(spec, temb_dim=spec.temb_dim + 1))
    with pytest.raises(InputError, match=r"SDUNetBackbone\.read returned temb"):
        backbone(torch.zeros(1, 4, 8, 8), torch.ones(1), backbone.encode_prompts(["a cat"]))


def test_a_unet_projects_its_prompt_embeddings_itself() -> None:
    whole = sd_unet(encoder_hid_dim=40, encoder_hid_dim_type="text_proj").eval()
    space, process = LatentSpace(4, 2, 1.0), process_from_scheduler(DDIM)
    backbone = SDUNetBackbone(copy.deepcopy(whole), process, space, text_taps=(0,), output_map=True)
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 40)
    features = backbone(latents, torch.tensor([300.0]), Conditioning(text, torch.zeros(1, WIDTH)))
    torch.testing.assert_close(features.output, whole(latents, 300, text).sample)
    torch.testing.assert_close(features.text[0], whole.encoder_hid_proj(text))


def own_unet(source: str, process: NoiseProcess | None = None) -> SDUNetBackbone:
    """A factory of the user's, on the U-Net of a pipeline, with the scheduler's noise or another one."""
    pipeline = PipelineSource(source)
    backbone = SDUNetBackbone(
        pipeline.load(UNet2DConditionModel, "unet", mapped=False),
        process or pipeline.noise_process(),
        pipeline.latent_space(),
        text_encoder=pipeline.clip_prompts(),
    )
    return finish(backbone, backbone.unet)


@pytest.mark.parametrize("process", [FlowMatching(), ContinuousFlow()], ids=lambda made: type(made).__name__)
def test_a_flows_noise_on_a_network_of_another_process_is_refused(process: NoiseProcess) -> None:
    folder = pipeline_folder("sd15")
    with pytest.raises(
        InputError, match=rf"^backbone: SDUNetBackbone adds noise as {type(process).__name__}, but its "
    ) as told:
        LRMModule(own_unet(folder, process), CLIPProjectionHead)
    place = (
        f"its UNet2DConditionModel is of source={folder!r} with a DDIMScheduler; give it PipelineSource(source).noise"
    )
    assert place in str(told.value) and "\n" not in str(told.value)
