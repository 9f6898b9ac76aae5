from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import LoraConfig

from latentreward.apps.generation import StepSearch, policy_of
from latentreward.apps.generation.step_search import levels_of
from latentreward.core.errors import InputError
from latentreward.diffusion.backbones.loading import tiny_pipeline
from latentreward.tinyworld.sampling import load_pipeline
from tests.apps.generation.toy_rewards import MeanLatent
from tests.marks import rotated_after
from tests.tiny_pipelines import pipeline_folder

PROMPTS = ["a large red circle on a white background", "a blue cross at the top on a gray background"]
FAMILIES = ["sd_tiny", "sd35_tiny", "sd21", "sdxl", "sd35_no_t5"]


@cache
def pipeline_of(name: str) -> Any:
    if name.endswith("_tiny"):
        return load_pipeline(Path(tiny_pipeline(name)))
    options = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd35_no_t5" else {}
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder(name), **options)
    if name == "sd21":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(name: str) -> torch.Tensor:
    shape = policy_of(pipeline_of(name)).latent_shape()
    return torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(0))


def generate(name: str, search: Any, number: int = 2, steps: int = 6) -> torch.Tensor:
    options = {"max_sequence_length": 0} if name.startswith("sd35") else {}
    latents = latents_of(name)[:number]
    return pipeline_of(name)(
        PROMPTS[:number], num_inference_steps=steps, guidance_scale=3.0, output_type="latent", latents=latents,
        callback_on_step_end=search, **options,
    ).images  # fmt: skip


def search_of(name: str, reward: MeanLatent, number: int = 2, **options: Any) -> StepSearch:
    return StepSearch(policy_of(pipeline_of(name)), reward, PROMPTS[:number], latents_of(name)[:number], **options)


@pytest.mark.parametrize("name", rotated_after(2, FAMILIES))
def test_the_pipeline_goes_on_from_the_best_candidate(name: str) -> None:
    search = search_of(name, MeanLatent(), num_candidates=6)

    def watched(pipeline: Any, index: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        made = search(pipeline, index, timestep, inputs)
        if len(search.scores) == index + 1:
            states = made["latents"] * levels_of(pipeline.scheduler, float(timestep)).next_scale
            torch.testing.assert_close(states.flatten(1).mean(dim=1), search.scores[index].max(dim=0).values)
        return made

    generate(name, watched)
    assert len(search.scores) == (6 if name == "sd_tiny" else 5)  # the others' last step leads to a clean state
    assert all((scores.std(dim=0) > 0).all() for scores in search.scores)


@pytest.mark.slow
def test_equal_seeds_give_equal_pictures_and_batches_do_not_matter() -> None:
    both, again, other = (generate("sd_tiny", search_of("sd_tiny", MeanLatent(), seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(both, again)
    assert not torch.allclose(both, other, atol=0.1)
    first = generate("sd_tiny", search_of("sd_tiny", MeanLatent(), number=1, seed=1), number=1)
    torch.testing.assert_close(first, both[:1], atol=1e-3, rtol=1e-3)


def test_a_loaded_lora_stays_at_work() -> None:
    pipeline = load_pipeline(Path(tiny_pipeline("sd_tiny")))
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "mine")
    policy = policy_of(pipeline)
    assert pipeline.unet.active_adapters() == ["mine"]
    with policy.reference():
        pass
    assert pipeline.unet.active_adapters() == ["mine"]


@pytest.mark.parametrize(("name", "needs_clean"), [("sd_tiny", True), ("flux", False)])
def test_what_it_cannot_read_is_refused(name: str, needs_clean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(pipeline_of("sd_tiny"))
    monkeypatch.setattr(type(policy.family), "plain_states", name == "sd_tiny")
    with pytest.raises(InputError, match="StepSearch cannot read this"):
        StepSearch(policy, MeanLatent(needs_clean), PROMPTS)
