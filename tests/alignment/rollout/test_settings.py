"""How a policy is sampled from: which sampler a pipeline gets, and refused settings."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from latentreward.alignment import DDIMSampler, FlowSDESampler, LPOModule, PolicySource, Sampling
from latentreward.apps.generation.image_folder import DETERMINISTIC
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.diffusion import LoRA
from latentreward.diffusion.backbones.loading import tiny_pipeline
from latentreward.diffusion.families.sd import StableDiffusion
from tests.alignment.modules.simple_reward import FirstChannelReward
from tests.alignment.rollout.tiny_rollout import tiny_policy
from tests.diffusion.families.made_configs import MadeConfigs


def tiny_copy(tmp_path: Path, **scheduler: object) -> Path:
    folder = Path(shutil.copytree(tiny_pipeline("sd_tiny"), tmp_path / "pipeline"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **scheduler}))
    return folder


def test_the_schedulers_class_decides() -> None:
    sampling = Sampling(7, eta=0.5, noise_level=0.3)
    ddim = sampling.sampler(tiny_policy("sd_tiny").family)
    flow = sampling.sampler(tiny_policy("sd35_tiny").family)
    assert isinstance(ddim, DDIMSampler)
    assert isinstance(flow, FlowSDESampler)
    assert len(ddim) == len(flow) == 7
    assert (ddim.noise_setting, flow.noise_setting) == ("eta=0.5", "noise_level=0.3")


@pytest.mark.parametrize("name", ["sd_tiny", "sd35_tiny"])
def test_pictures_have_no_noise_of_their_own_and_rollouts_do(name: str) -> None:
    family = tiny_policy(name).family
    for sampling in (Sampling(), DETERMINISTIC):
        assert not sampling.sampler(family).noise_std.any()
    assert Sampling().with_noise() == Sampling(eta=1.0, noise_level=0.7)
    assert Sampling().with_noise().sampler(family).noise_std.any()
    assert DETERMINISTIC.with_noise() == DETERMINISTIC
    module = LPOModule(PolicySource(name, lora=LoRA(rank=2)), FirstChannelReward(), sampling=Sampling(4), seed=0)
    assert module.sampling == Sampling(4, eta=1.0, noise_level=0.7) and len(module.sampler) == 4


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_any_scheduler_of_the_family_gives_ddim(name: str) -> None:
    configs = {part: tiny_policy("sd_tiny").family.pipeline.config(part) for part in ("unet", "vae", "scheduler")}
    configs["scheduler"]["_class_name"] = name
    sampler = Sampling().sampler(StableDiffusion(MadeConfigs(configs)))
    assert sampler.timesteps.tolist() == [float(t) for t in range(951, 0, -50)]


def test_stable_diffusion_is_sampled_with_the_offset_that_its_pipeline_sets(tmp_path: Path) -> None:
    """diffusers' own pipeline replaces two entries of old scheduler configs; SDXL's does not."""
    folder = tiny_copy(tmp_path, steps_offset=0, clip_sample=True, set_alpha_to_one=False)
    with pytest.warns(FutureWarning, match="outdated|has not set"):
        theirs = StableDiffusionPipeline.from_pretrained(folder).scheduler
    theirs.set_timesteps(8)
    family = PolicySource(str(folder)).resolve_family()
    assert Sampling(8).sampler(family).timesteps.tolist() == theirs.timesteps.tolist() == [*range(876, 0, -125)]
    xl = MadeConfigs({"unet": {"addition_embed_type": "text_time"}, "scheduler": {"steps_offset": 0}})
    assert StableDiffusion(xl).scheduler_config["steps_offset"] == 0


@pytest.mark.slow
def test_a_unet_with_a_scheduler_of_another_process_is_refused(tmp_path: Path) -> None:
    folder = tiny_copy(tmp_path, _class_name="FlowMatchEulerDiscreteScheduler")
    for use in (
        lambda: create_backbone("sd_tiny", source=str(folder)),
        lambda: Sampling(4).sampler(PolicySource(str(folder)).resolve_family()),
        lambda: PolicySource(str(folder)).load().noise_process,
    ):
        with pytest.raises(InputError, match=r"of class FlowMatchEuler\w+, .* one of DDIMScheduler"):
            use()


def test_levels_of_an_estimate_have_values() -> None:
    """An estimate builds modules on the meta device; a family's own ``levels`` may make tensors where it likes."""
    family = PolicySource("sd35_tiny").resolve_family()
    family.levels = lambda steps, shape: (torch.linspace(1000, 0, steps + 1)[:-1], torch.linspace(1, 0, steps + 1))
    with torch.device("meta"):
        sampler = Sampling(num_inference_steps=4).sampler(family)
    assert sampler.timesteps.tolist() == [1000, 750, 500, 250]
