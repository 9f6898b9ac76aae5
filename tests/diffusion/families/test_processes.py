"""Policies of two families on two processes, resumed, and loaded again in a new process."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from latentreward.alignment import LatentReward, Sampling
from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.core.checkpoints.fsdp2 import FSDP2Strategy
from latentreward.core.contracts import NoisyStates
from latentreward.core.registry import create_backbone
from latentreward.diffusion import LoRA
from latentreward.reward import GatedQFormerHead, RewardModel
from latentreward.reward.modules.sharding import shard_policy, shard_scorers
from tests.alignment.modules.lpo_runs import saved_run
from tests.diffusion.families.twins import PROMPTS, TWINS, noise_for
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.slow
FAMILIES = ("z_image", "wan21")
"""One with lists, masks and ragged prompts; one with a time axis, and weights that stay float32."""
STRATEGIES = ("ddp", "fsdp2")
BY_FAMILY = {twin.family: twin for twin in TWINS.values()}


def options(name: str) -> dict[str, Any]:
    height, width = TWINS[name].size
    return {"source": TWINS[name].folder, "sampling": Sampling(3, height=height, width=width)}


def cases_of_two(folder: Path) -> dict[str, Any]:
    """On ranks: runs of each family under DDP and FSDP2, and the rest of the DDP run."""
    settings = {name: options(name) for name in FAMILIES}  # before the process group, in which only rank 0 writes
    results = {}
    for name in FAMILIES:
        results[f"{name} ddp"] = saved_run(folder / name / "ddp", "ddp", options=settings[name])
        results[f"{name} fsdp2"] = saved_run(folder / name / "fsdp2", FSDP2Strategy(), options=settings[name])
        rest = folder / name / "ddp" / "step=3.ckpt"
        results[f"{name} resumed"] = saved_run(folder / name / "again", "ddp", rest, settings[name])
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(
        "tests.diffusion.families.test_processes:cases_of_two", tmp_path_factory.mktemp("ranks"), timeout=1200
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("one")
    return folder, {name: saved_run(folder / name, options=options(name)) for name in FAMILIES}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_processes_equal_one(name: str, strategy: str, ranks: Any, one: Any) -> None:
    whole = one[1][name]
    for rank in ranks:
        assert rank[f"{name} {strategy}"]["steps"] == whole["steps"] == 8
        for key, value in whole["weights"].items():
            torch.testing.assert_close(rank[f"{name} {strategy}"]["weights"][key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_resumed_run_ends_with_the_same_weights(name: str, ranks: Any, one: Any, tmp_path: Path) -> None:
    for rank in ranks:
        whole, rest = rank[f"{name} ddp"]["weights"], rank[f"{name} resumed"]["weights"]
        assert all(torch.equal(rest[key], value) for key, value in whole.items())
    rest = saved_run(tmp_path, resume=one[0] / name / "step=3.ckpt", options=options(name))
    assert all(torch.equal(rest["weights"][key], value) for key, value in one[1][name]["weights"].items())


def write_rewards(folder: Path) -> None:
    """Publish a reward of each family whose adapter a policy can share."""
    for name, twin in BY_FAMILY.items():
        torch.manual_seed(0)
        settings = {"visual_taps": [1], "text_taps": [1], "tuning": "lora", "lora": LoRA(2, 4.0)}
        backbone = create_backbone(twin.backbone, source=twin.folder, **settings)
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(0.1 if parameter.requires_grad else 0.0)
        head = GatedQFormerHead(backbone.feature_spec, num_queries=2, num_heads=2)
        RewardModel(backbone, head).eval().save_pretrained(folder / name)


def scores_of_shared_rewards(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """On ranks: scores by a reward on the policy's network, before and after both are sharded."""
    policies = {name: twin.source().load().eval() for name, twin in BY_FAMILY.items()}  # see cases_of_two
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name, policy in policies.items():
        twin = BY_FAMILY[name]
        reward = LatentReward(str(folder / name), base=twin.folder).load(policy)
        latents, timesteps = noise_for(policy.latent_shape(*twin.size)), torch.tensor([300.0, 800.0])
        states = NoisyStates(latents, timesteps, torch.arange(2))
        with torch.no_grad():
            before = reward(states, reward.encode_prompts(PROMPTS))
            shard_policy(policy, mesh)
            scorers = [part.model.backbone for part in reward.modules() if isinstance(part, LatentScorer)]
            shard_scorers(scorers, {*reward.modules()}, mesh)
            policy.predict(latents, timesteps, policy.encode_prompts(PROMPTS))
            found[name] = before, reward(states, reward.encode_prompts(PROMPTS))
    return found


def test_a_reward_on_a_sharded_policys_network_scores_as_before(tmp_path: Path) -> None:
    write_rewards(tmp_path)
    for rank in on_ranks("tests.diffusion.families.test_processes:scores_of_shared_rewards", tmp_path):
        for name, (before, after) in rank.items():
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6, msg=name)
