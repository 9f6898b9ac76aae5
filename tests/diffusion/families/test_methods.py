"""Every alignment method trains a policy of every family: adapters move, frozen weights keep their bits."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor
from torch.utils.data import DataLoader

from latentreward.alignment import (
    AlignmentModule,
    Branching,
    DiffusionDPOModule,
    LPOModule,
    Policy,
    PolicySource,
    QuantileThreshold,
    ReFLModule,
    Reward,
    RewardSource,
    Sampling,
    SPOModule,
    StepwiseGRPOModule,
    TrajectoryGRPOModule,
)
from latentreward.core.contracts import LatentSpace, NoisyStates, PreferenceBatch, PromptBatch
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.reward.modules.reward import PairDraws
from tests.alignment.modules.lpo_runs import make_trainer
from tests.alignment.modules.simple_reward import FirstChannelReward
from tests.diffusion.families.twins import PROMPTS, TWINS, Twin, noise_for, one_per_family
from tests.marks import rotated_after


class Redness(Reward):
    """Mean of the first channel of decoded predictions, as rewards on pixels see it."""

    needs_clean = differentiable = True

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self._policy = (policy,)

    def encode_prompts(self, prompts: Any) -> None:
        return None

    def score(self, states: NoisyStates, encoded: None) -> Tensor:
        return 10 * self._policy[0].vae.decode(states.clean)[:, 0].flatten(1).mean(dim=1)


class RednessSource(RewardSource):
    def latent_space(self) -> LatentSpace | None:
        return None

    def load(self, policy: Policy) -> Reward:
        return Redness(policy)


class DifferentiableChannel(FirstChannelReward):
    def load(self, policy: Policy) -> Reward:
        reward = super().load(policy)
        reward.differentiable = True
        return reward


def sgd(groups: Any) -> torch.optim.SGD:
    return torch.optim.SGD(groups, lr=0.1)


def sampling(twin: Twin, steps: int = 4) -> Sampling:
    return Sampling(steps, height=twin.size[0], width=twin.size[1])


def rolled(kind: type[AlignmentModule], reward: Callable[[], RewardSource] = FirstChannelReward, **options: Any) -> Any:
    def make(twin: Twin, source: PolicySource) -> AlignmentModule:
        settings = {"sampling": sampling(twin), "optimizer": sgd, "seed": 0, **options}
        return kind(source, reward(), guidance_scale=twin.guidance, **settings)

    return make


PAIRWISE = {"candidates": Branching(2), "selection": QuantileThreshold(0.0)}
METHODS: dict[str, Any] = {
    "lpo": rolled(LPOModule, **PAIRWISE),
    "spo": rolled(SPOModule, RednessSource, **PAIRWISE | {"candidates": Branching(2, score_at="candidate")}),
    "grpo_stepwise": rolled(StepwiseGRPOModule, candidates=Branching(2)),
    "grpo_trajectory": rolled(TrajectoryGRPOModule, num_trajectories=2),
    "refl": rolled(ReFLModule, DifferentiableChannel, stop_range=(1, 2)),
    "diffusion_dpo": lambda twin, source: DiffusionDPOModule(source, optimizer=sgd, seed=0),
}


def pairs(policy: Policy, twin: Twin) -> PreferenceBatch:
    """Two pairs of latents."""
    chosen, rejected = (noise_for(policy.latent_shape(*twin.size), seed=seed) for seed in (1, 2))
    names = ("a", "b")
    ones = torch.ones(2)
    return PreferenceBatch(
        names, PROMPTS, chosen, rejected, names, ("c", "d"), ones, ones, latent_space=policy.latent_space
    )


def every_method_of_every_family() -> list[ParameterSet]:
    """Each method once, each on another family; the others in `.ci/run`, a third at a time."""
    families = sorted(one_per_family(), key=lambda twin: twin.family == "flux2_klein")  # whose text encoder is deep
    chosen = [*zip(families, METHODS, strict=False)]
    others = [pair for pair in product(families, METHODS) if pair not in chosen]
    named = [pytest.param(twin, method, id=f"{twin.family}-{method}") for twin, method in [*chosen, *others]]
    return rotated_after(len(chosen), named)


@pytest.mark.parametrize(("twin", "method"), every_method_of_every_family())
def test_two_steps(twin: Twin, method: str, tmp_path: Path) -> None:
    module = METHODS[method](twin, twin.source())
    before = {name: weight.detach().clone() for name, weight in module.policy.named_parameters()}
    data: Any = PromptLoaders(PROMPTS, batch_size=2, prompts_per_rollout=2, batches_per_epoch=2, seed=1)
    if method == "diffusion_dpo":
        data = DataLoader([pairs(module.policy, twin)] * 2, batch_size=None)
    elif method == "refl":
        data = DataLoader([PromptBatch(PROMPTS, ("0/0", "0/1"))] * 2, batch_size=None)
    keys = {"train_dataloaders": data} if isinstance(data, DataLoader) else {"datamodule": data}
    make_trainer(tmp_path, max_steps=2, max_epochs=-1).fit(module, **keys)
    after = dict(module.policy.named_parameters())
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    trained = {name for name, weight in after.items() if weight.requires_grad}
    assert all(weight.isfinite().all() for weight in after.values())
    assert moved <= trained
    idle = {f"transformer_blocks.{twin.layers - 1}.attn.add_q_proj"} if twin.family == "sd3" else set()
    still = {name for name in trained - moved if "lora_B" in name}
    assert {name.removeprefix("network.").partition(".lora_B")[0] for name in still} == idle


@pytest.mark.slow
def test_diffusion_dpo_gives_a_network_its_guidance_scale() -> None:
    twin, found = TWINS["flux1_dev"], []
    for scale in (1.0, 10.0):
        module = DiffusionDPOModule(twin.source(), guidance_scale=scale, optimizer=sgd, seed=0)
        for name, weight in module.policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
        batch = pairs(module.policy, twin)
        encoded = module.encode(batch, PairDraws(batch, 0, 0))
        found.append(module.compare(batch, encoded, torch.full((4,), 500.0)).scores.chosen)
    assert not torch.allclose(*found)


def test_refl_gives_a_network_its_guidance_scale_on_images() -> None:
    twin, found = TWINS["flux1_dev"], []
    for scale in (1.0, 10.0):
        settings = {"sampling": sampling(twin), "stop_range": (1, 2), "pretraining_weight": 1.0, "optimizer": sgd}
        module = ReFLModule(twin.source(), DifferentiableChannel(), guidance_scale=scale, seed=0, **settings)
        found.append(module.pretraining_term(pairs(module.policy, twin)))
    assert not torch.allclose(*found)
