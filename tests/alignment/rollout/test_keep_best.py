"""KeepBest in running diffusers pipelines: the pictures that it leaves are those of a run of their own."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from latentreward.alignment import KeepBest
from latentreward.core.errors import InputError
from latentreward.reward import RewardModel
from tests.alignment.modules.batches import MODULES
from tests.marks import slow_after
from tests.tiny_pipelines import pipeline_folder

CASES = {
    "sd15": (
        "StableDiffusionPipeline",
        "lrm",
        ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"),
    ),
    "sdxl": ("StableDiffusionXLPipeline", "lrm", ("DDIMScheduler",)),
    "sd3": ("StableDiffusion3Pipeline", "dina", ("FlowMatchEulerDiscreteScheduler",)),
}
PROMPTS = ["a red circle", "a blue square"]
STEPS = 4


def reward_of(name: str) -> RewardModel:
    return MODULES[CASES[name][1]](name).model.eval().requires_grad_(False)


def pipe_of(name: str, scheduler: str) -> Any:
    kind = CASES[name][0]
    options = {"safety_checker": None} if name == "sd15" else {}
    pipe = getattr(diffusers, kind).from_pretrained(pipeline_folder(name), local_files_only=True, **options)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("name", "scheduler"), slow_after(2, [(name, one) for name, (_, _, every) in CASES.items() for one in every])
)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_best_of_each_prompt_are_finished(name: str, scheduler: str, guidance: float) -> None:
    """They are the pictures that the pipeline makes of their noises without a callback."""
    pipe, reward = pipe_of(name, scheduler), reward_of(name)
    how = {"num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "latent"}
    seen: list[torch.Tensor] = []
    score = reward.score_states

    def watched(*given: Any, **options: Any) -> torch.Tensor:
        seen.append(score(*given, **options))
        return seen[-1]

    reward.score_states = watched  # type: ignore[method-assign]
    keep = KeepBest(reward, PROMPTS, {0: 3, 2: 1})
    call = {"num_inference_steps": STEPS, "guidance_scale": guidance}
    given = keep.options(pipe, 5, generator=torch.Generator().manual_seed(0), **call)
    noises = given["latents"]
    assert len(noises) == 6 and seen[0].shape == (10, 1) and given["num_images_per_prompt"] == 3
    found = pipe(output_type="latent", **given).images
    assert len(found) == 2 and seen[1].shape == (6, 1)
    rows = seen[1].view(2, 3).argmax(dim=1) + torch.tensor([0, 3])
    alone = pipe_of(name, scheduler)(PROMPTS, latents=noises[rows], **how).images
    torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-4)


def test_states_of_eulers_scheduler_are_scored_as_those_of_ddim() -> None:
    """They are x + σ·ε, of another scale."""
    reward, states = reward_of("sd15"), dict[str, torch.Tensor]()
    for scheduler in ("DDIMScheduler", "EulerDiscreteScheduler"):
        pipe, keep = pipe_of("sd15", scheduler), KeepBest(reward, PROMPTS[0], {3: 1})

        def watched(
            prompts: Any, latents: torch.Tensor, *given: Any, name: str = scheduler, **options: Any
        ) -> torch.Tensor:
            states[name] = latents
            return torch.zeros(len(latents), 1)

        reward.score_states = watched  # type: ignore[method-assign]
        generator = torch.Generator().manual_seed(0)
        pipe(**keep.options(pipe, 4, num_inference_steps=5, guidance_scale=7.5, generator=generator))
    first, second = states.values()
    assert second.std().item() == pytest.approx(first.std().item(), rel=0.2)


def test_what_does_not_fit_is_refused_in_a_line() -> None:
    reward = reward_of("sd15")
    for keep in ({0: 2, 1: 3}, {1: 0}, {-1: 2}):
        with pytest.raises(InputError, match="must map numbers of finished steps"):
            KeepBest(reward, "a", keep)
    pipe, call = pipe_of("sd15", "DDIMScheduler"), {"num_inference_steps": 2, "guidance_scale": 1.0}
    for keep, told in (
        ({0: 5}, "there are 4 pictures of each prompt, of which 5"),
        ({2: 1}, "the scheduler has 2 steps, none of which follows 2"),
    ):
        with pytest.raises(InputError, match=told):
            KeepBest(reward, "a", keep).options(pipe, 4, **call)
    with pytest.raises(InputError, match="there are 4 pictures of each prompt, of which 5"):
        pipe(**KeepBest(reward, "a", {1: 5}).options(pipe, 4, **call))
    with pytest.raises(InputError, match=r"KeepBest knows .*, not PosixPath"):
        KeepBest(reward, "a", {1: 1}).options(Path(), 4, **call)
    with pytest.raises(InputError, match=r"makes latents \(channels, scale, shift\)"):
        KeepBest(reward, "a", {1: 1}).options(pipe_of("sd3", "FlowMatchEulerDiscreteScheduler"), 4, **call)
