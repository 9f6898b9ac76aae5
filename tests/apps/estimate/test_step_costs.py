"""An estimate says what a real step takes: FLOPs exactly, memory for the backward pass within 5 %."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from latentreward.alignment import (
    AlignmentModule,
    Branching,
    CallableReward,
    DiffusionDPOModule,
    LatentReward,
    LPOModule,
    PolicySource,
    QuantileThreshold,
    ReFLModule,
    RewardSource,
    Sampling,
    StepwiseGRPOModule,
    TrajectoryGRPOModule,
)
from latentreward.apps.estimate.shapes import (
    IN_FLOAT32,
    SavedTensors,
    ShapesOnly,
    complete_flop_formulas,
    gpu_autocast,
)
from latentreward.apps.estimate.step_costs import StepCosts, prompt_batch, step_costs
from latentreward.apps.estimate.unread import UnreadReward
from latentreward.core.contracts import PromptBatch, take_rows
from latentreward.diffusion import LoRA
from latentreward.reward.modules.training import stored_parts
from tests.alignment.modules import batches
from tests.alignment.rewards.stored import write_run
from tests.marks import rotated_after
from tests.tiny_pipelines import PIXELS, source_of

PAIRS = Namespace(class_path="latentreward.data.PreferenceDataModule", init_args=Namespace(batch_size=4, size=PIXELS))
PROMPTS = Namespace(
    class_path="latentreward.data.PromptDataModule", init_args=Namespace(batch_size=4, prompts_per_rollout=2)
)
FOUR = PromptBatch(tuple(f"prompt {number}" for number in range(4)), tuple(f"0/{number}" for number in range(4)))
LORA = LoRA(rank=2, alpha=2.0)


def ready(module: LightningModule) -> LightningModule:
    """The module with a trainer."""
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module.log = module.log_dict = lambda *_, **__: None
    return module.train()


def pairs() -> Any:
    """A batch of PAIRS, each with its own prompt."""
    batch = batches.pixel_batch(4, labels=(1.0,))
    return replace(batch, prompts=tuple(f"prompt {number}" for number in range(4)))


def measured(module: LightningModule, batch: Any) -> tuple[int, int]:
    """FLOPs of a real step, and bytes that it keeps for its backward pass; ``batch`` if it makes none of a rollout."""
    ready(module)
    complete_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        if isinstance(module, AlignmentModule) and module.experience:
            rows = module.roll_out(prompt_batch(module.policy, 2))
            module.prepare_prompts(list(dict.fromkeys(rows.prompts)))
            batch = take_rows(rows, range(4))
        with (saved := SavedTensors([*module.parameters(), *module.buffers()])):
            result = module.training_step(batch, 0)
        (result["loss"] if isinstance(result, Mapping) else result).backward()
    return counter.get_total_flops(), saved.bytes.peak


def check(build: Callable[[], LightningModule], data: Namespace, batch: Any = None, real: Any = None) -> StepCosts:
    """Compare the estimate with the real step."""
    module = (real or build)()
    flops, saved = measured(module, batch)
    with torch.device("meta"):
        unread = build()
    costs = step_costs(ready(unread), data, gpu=False)
    assert costs.rollout + costs.forward + costs.backward == flops
    assert costs.saved == pytest.approx(saved, rel=0.05)
    assert sum(part.parameters for part in costs.parts) == sum(weight.numel() for weight in module.parameters())
    stored = [part for weight in (*module.parameters(), *module.buffers()) for part in stored_parts(weight.detach())]
    assert costs.weights == sum(part.nbytes for part in stored)
    return costs


@pytest.mark.rotated
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lrm", "dina"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_reward_module(kind: str, checkpointing: bool) -> None:
    options = {"backbone": {"gradient_checkpointing": checkpointing}}
    costs = check(lambda: batches.MODULES[kind](**options), PAIRS, pairs())
    assert costs.state == 2 * costs.gradients
    assert costs.batch_peak > costs.weights + costs.state + costs.saved


def policy(name: str) -> PolicySource:
    return PolicySource(source_of(name), lora=LORA, gradient_checkpointing=name == "sd35", t5_length=5)


def lpo(name: str, reward: RewardSource) -> LPOModule:
    steps = Sampling(num_inference_steps=3)
    return LPOModule(
        policy(name), reward, QuantileThreshold(0.0), steps, Branching(num_candidates=3), guidance_scale=2.0, seed=0
    )


def refl(name: str, reward: RewardSource) -> ReFLModule:
    steps = Sampling(num_inference_steps=4)
    return ReFLModule(policy(name), reward, steps, (1, 1), kl_weight=0.5, guidance_scale=1.0, seed=0)


def grpo(name: str, reward: RewardSource) -> TrajectoryGRPOModule:
    steps = Sampling(num_inference_steps=3)
    return TrajectoryGRPOModule(policy(name), reward, steps, 2, guidance_scale=1.0, seed=0)


def stepwise_grpo(name: str, reward: RewardSource) -> StepwiseGRPOModule:
    steps, candidates = Sampling(num_inference_steps=3), Branching(num_candidates=3)
    return StepwiseGRPOModule(policy(name), reward, steps, candidates, guidance_scale=2.0, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "name"),
    rotated_after(
        1,
        [
            (lpo, "sd35"),
            (refl, "sd15"),
            (grpo, "sd35"),
            (lpo, "sd15"),
            (refl, "sd35"),
            (grpo, "sd15"),
            (stepwise_grpo, "sd15"),
        ],
    ),
)
def test_alignment(build: Any, name: str, tmp_path: Path) -> None:
    """On SD3.5 the reward is an adapter of the policy's own network, of which blocks are computed again."""
    options = {"tuning": "lora", "lora": {"rank": 2, "alpha": 2.0}} if name == "sd35" else {}
    write_run(tmp_path / "run", "dina" if name == "sd35" else "lrm", name, **options)
    path = str(tmp_path / "run")
    unread = UnreadReward(path, "lrm_sd15", None, str(tmp_path / "kept"))
    costs = check(lambda: build(name, unread), PROMPTS, FOUR, lambda: build(name, LatentReward(path)))
    assert costs.rollout > 0


def of_values(latents: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.from_numpy(latents.cpu().numpy().mean(axis=(1, 2, 3)))


def test_a_reward_that_needs_values_is_told_and_left_out() -> None:
    with pytest.warns(UserWarning, match=r"--estimate leaves out a reward .* \(RuntimeError: .*numpy"):
        costs = check(lambda: grpo("sd15", CallableReward(of_values)), PROMPTS, FOUR)
    assert costs.rollout > 0


@pytest.mark.rotated
@pytest.mark.slow
def test_diffusion_dpo() -> None:
    costs = check(lambda: DiffusionDPOModule(policy("sd15"), seed=0), PAIRS, pairs())
    assert costs.rollout == costs.rollout_peak == 0


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", rotated_after(0, [True, False]))
def test_quantised_layers(checkpointing: bool) -> None:
    """Smaller weights, which torchao unpacks for each product; without checkpointing autograd keeps the copies."""

    def build(kind: Any) -> DiffusionDPOModule:
        source = replace(policy("sd35"), quantization=kind, gradient_checkpointing=checkpointing)
        return DiffusionDPOModule(source, seed=0)

    quantised = check(lambda: build("int8"), PAIRS, pairs())
    with torch.device("meta"):
        unread = [build(kind) for kind in (None, "nf4")]
    whole, nf4 = (step_costs(ready(module), PAIRS, gpu=False) for module in unread)
    assert nf4.weights < quantised.weights < whole.weights
    assert nf4.batch_peak == whole.batch_peak - (whole.weights - nf4.weights)
    assert nf4.saved == whole.saved
    assert (quantised.saved > whole.saved) == (not checkpointing)


def test_live_memory_is_that_of_tensors_that_exist() -> None:
    shapes = ShapesOnly()
    with shapes:
        first = shapes.stand_in((256,))
        second = (first + 1).view(16, 16)
        assert (shapes.live.now, shapes.live.peak) == (2048, 2048)
        third = second @ second
        del first, second
    assert (shapes.live.now, shapes.live.peak) == (1024, 3072)
    assert shapes.flops == 2 * 16**3
    assert third.shape == (16, 16)


def test_attention_counts() -> None:
    """Two matrix products forward and five backward, by stand-ins and by FlopCounterMode alike, in each release."""
    product = 2 * 2 * 3 * 16 * 24 * 8
    with (shapes := ShapesOnly()):
        queries, keys = (shapes.stand_in((2, 3, length, 8)).requires_grad_() for length in (16, 24))
        output = scaled_dot_product_attention(queries, keys, keys)
        assert shapes.flops == 2 * product
        output.sum().backward()
    assert shapes.flops == 7 * product
    queries, keys = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (16, 24))
    with FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(queries, keys, keys).sum().backward()
    assert counter.get_total_flops() == 7 * product


def test_autocast_is_that_of_a_gpu() -> None:
    norm, values = nn.GroupNorm(1, 4), torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        before = norm(values).dtype
        with gpu_autocast():
            assert norm(values).dtype == torch.float32
        assert norm(values).dtype == before == torch.bfloat16
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for _, _, operation in IN_FLOAT32:
        assert has(f"aten::{operation}", "AutocastCUDA"), operation
        assert not has(f"aten::{operation}", "AutocastCPU"), operation
