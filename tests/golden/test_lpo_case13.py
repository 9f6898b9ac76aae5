"""One whole sampling pass of SPO: candidates are scored through the policy's clean latents, whose network output is
reused."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from latentreward.alignment import Branching, FixedThreshold, Reward, Sampling, candidate_steps, step_pairs
from latentreward.core.contracts import NoisyStates, join_rows
from tests.golden.catalogue import Case, cases
from tests.golden.closeness import assert_close
from tests.golden.sampling_trace import Calls, RecordedDraws, checkpoint_of, policy_of, prompts_of
from tests.reward.scoring.models import load_lrm

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


class StandIn(Reward):
    """The recorded reward, on a decoder that drops a channel."""

    needs_clean = True

    def __init__(self, weight: Tensor, scaling_factor: float) -> None:
        super().__init__()
        self.weight, self.scaling_factor, self.timesteps = weight, scaling_factor, []
        self.decoded = torch.empty(0)

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        return None

    def score(self, states: NoisyStates, encoded: None) -> Tensor:
        assert states.clean is not None
        assert len(states.timesteps.unique()) == 1
        self.timesteps.append(states.timesteps[0].item())
        self.decoded = states.clean[:, :3] / self.scaling_factor
        return 2 * (1 + states.timesteps / 1000) * (self.weight * self.decoded).mean(dim=(1, 2, 3))


@pytest.mark.parametrize("case", cases("lpo/13"), ids=lambda case: case.name)
def test_sampling_pass(case: Case) -> None:
    data, options = case.tensors(), case.options
    start, sampling = options["divert_start_step"], Sampling(options["num_inference_steps"], options["eta"])
    policy, prompts = policy_of(case, data), prompts_of(case)
    reward = StandIn(data["reward_weight"], options["vae_scaling_factor"])
    height, width = data["init_latents"].shape[-2:]
    sampling.height, sampling.width = height * policy.latent_space.downscale, width * policy.latent_space.downscale
    sampler = sampling.sampler(policy.family)
    branching = Branching(options["K"], high=sampler.timesteps[start].item(), score_at="candidate")
    selection, kept, calls = FixedThreshold(options["threshold"]), [], Calls(policy.network)
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
    for place, step in enumerate(rollout):
        assert_close(step.scores, data["scores"][place], f"scores {place}", **TOLERANCE)
        kept.append(step_pairs(step, selection.select(step, sampler), prompts))
    assert reward.timesteps == data["reward_timesteps"].tolist()
    assert_close(reward.decoded, data["last_decoded"], "last_decoded", **TOLERANCE)
    assert [timestep for timestep, _ in calls] == data["unet_timesteps"].tolist()
    for index, (_, latents) in enumerate(calls):
        assert_close(latents, data[f"unet_input_{index}"], f"unet_input_{index}", **TOLERANCE)
    pairs = join_rows(kept)
    assert_close(pairs.timesteps[:, None], data["valid_timesteps"], "valid_timesteps")
    assert_close(pairs.latents[:, None], data["valid_current_latents"], "valid_current_latents", **TOLERANCE)
    both = torch.stack([pairs.chosen, pairs.rejected], dim=1)
    assert_close(both, data["valid_next_latents"], "valid_next_latents", **TOLERANCE)


@pytest.mark.parametrize("case", cases("lpo/13"), ids=lambda case: case.name)
def test_recorded_embeddings_belong_to_the_recorded_ids(case: Case) -> None:
    data = case.tensors()
    encoder = load_lrm(checkpoint_of(case)).backbone.text_encoder
    embeds = encoder.encode_ids(data["input_ids"]).prompt_embeds
    assert_close(embeds, data["prompt_embeds"], "prompt_embeds", **TOLERANCE)
