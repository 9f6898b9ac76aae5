"""One whole sampling pass of LPO: states, scores, choices and kept pairs."""

from collections.abc import Sequence
from itertools import islice

import pytest
import torch
from torch import Tensor

from latentreward.alignment import (
    Branching,
    LinearThreshold,
    Sampling,
    SigmaThreshold,
    VarianceThreshold,
    candidate_steps,
    step_pairs,
)
from latentreward.alignment.rewards.latent import EncodedPrompts, LatentScorer
from latentreward.core.contracts import Conditioning, NoisyStates, join_rows
from latentreward.diffusion import NoiseProcess, process_from_scheduler
from latentreward.reward import RewardModel
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_close
from tests.golden.sampling_trace import SCHEDULER, Calls, RecordedDraws, checkpoint_of, policy_of, prompts_of
from tests.reward.scoring.models import load_lrm

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
SELECTIONS = {"sigma": SigmaThreshold, "variance": VarianceThreshold, "linear": LinearThreshold}


class LRMOfRecordedPrompts(LatentScorer):
    """The published reward; its checkpoint has no tokenizer, so prompts come as recorded token ids."""

    def __init__(self, model: RewardModel, process: NoiseProcess, data: Tensors, empty: Conditioning) -> None:
        super().__init__(model, process)
        self.data, self.empty, self.timesteps = data, empty, []

    def encode_prompts(self, prompts: Sequence[str]) -> EncodedPrompts:
        ids = [self.data[name] for name in ("input_ids", "input_ids_2") if name in self.data]
        encoded = self.model.backbone.text_encoder.encode_ids(*ids)
        return EncodedPrompts(encoded.select([int(prompt) for prompt in prompts]), self.empty)

    def score(self, states: NoisyStates, encoded: EncodedPrompts) -> Tensor:
        assert len(states.timesteps.unique()) == 1
        self.timesteps.append(states.timesteps[0].item())
        return super().score(states, encoded)


def reward_of(case: Case, data: Tensors) -> LRMOfRecordedPrompts:
    folder = checkpoint_of(case)
    model = load_lrm(folder, guidance=case.options["reward_guidance_scale"]).requires_grad_(False).eval()
    of_model = Tensors(folder.parent / "data.safetensors")
    ids = [of_model[name] for name in ("neg_input_ids", "neg_input_ids_2") if name in of_model]
    with torch.no_grad():
        empty = model.backbone.text_encoder.encode_ids(*ids)
    return LRMOfRecordedPrompts(model, process_from_scheduler(SCHEDULER), data, empty)


@pytest.mark.parametrize("case", cases("lpo/12"), ids=lambda case: case.name)
def test_sampling_pass(case: Case) -> None:
    data, options = case.tensors(), case.options
    start, stop = options["divert_start_step"], options["divert_end_step"] or options["num_inference_steps"]
    sampling = Sampling(options["num_inference_steps"], options["eta"])
    policy, reward, prompts = policy_of(case, data), reward_of(case, data), prompts_of(case)
    sampling.height, sampling.width = (side * policy.latent_space.downscale for side in options["latent_hw"])
    sampler = sampling.sampler(policy.family)
    times = sampler.timesteps.tolist()
    branching = Branching(options["K"], low=times[stop - 1], high=times[start])
    selection = SELECTIONS[options["dynamic_threshold"]](options["threshold_min"], options["threshold_max"])
    calls, kept = Calls(policy.network), []
    rollout = candidate_steps(
        policy,
        sampler,
        reward,
        prompts,
        branching,
        sampling,
        options["guidance_scale"],
        RecordedDraws(data, start),
    )
    for place, step in enumerate(islice(rollout, stop - start)):
        selected = selection.select(step, sampler)
        assert_close(step.scores, data["scores"][place], f"scores {place}", **TOLERANCE)
        best_and_worst = torch.stack([selected.winner, selected.loser])
        assert torch.equal(best_and_worst, data["win_lose_index"][place]), place
        assert torch.equal(selected.kept, data["kept"][place]), place
        kept.append(step_pairs(step, selected, prompts))
    rollout.close()
    assert reward.timesteps == data["reward_timesteps"].tolist()
    assert [timestep for timestep, _ in calls] == data["unet_timesteps"].tolist()
    for place, (_, latents) in enumerate(calls):
        assert_close(latents, data["unet_input_latents"][place], f"unet_input_latents {place}", **TOLERANCE)
    pairs = join_rows(kept)
    assert_close(pairs.timesteps[:, None], data["valid_timesteps"], "valid_timesteps")
    assert_close(pairs.latents[:, None], data["valid_current_latents"], "valid_current_latents", **TOLERANCE)
    both = torch.stack([pairs.chosen, pairs.rejected], dim=1)
    assert_close(both, data["valid_next_latents"], "valid_next_latents", **TOLERANCE)
    if "valid_add_text_embeds" in data:
        pooled = policy.encode_prompts(pairs.prompts).pooled_prompt_embeds
        assert_close(pooled[:, None], data["valid_add_text_embeds"], "valid_add_text_embeds")
        for extra in calls.extra:
            without, with_prompt = extra["time_ids"].chunk(2)
            for row in range(len(prompts)):
                assert_close(with_prompt[row], data["add_time_ids"][0], "add_time_ids")
                assert_close(without[row], data["negative_add_time_ids"][0], "negative_add_time_ids")


@pytest.mark.parametrize("case", cases("lpo/12"), ids=lambda case: case.name)
def test_recorded_embeddings_belong_to_the_recorded_ids(case: Case) -> None:
    data = case.tensors()
    encoded = reward_of(case, data).encode_prompts(prompts_of(case).prompts)
    assert_close(encoded.conditioning.prompt_embeds, data["prompt_embeds"], "prompt_embeds", **TOLERANCE)
