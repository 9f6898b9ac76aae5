"""What must hold on a GPU: precision, compiled blocks, attention kernels, resuming. Each body runs on a CPU too.

On a machine with a GPU: ``pytest -m gpu``.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from latentreward.callbacks.performance import StepTimes
from torch import nn

from latentreward.core.registry import create_backbone
from latentreward.diffusion.backbones.compilation import compile_blocks
from latentreward.reward import RewardModel
from tests.alignment.modules.batches import MODULES, pixel_batch
from tests.diffusion.backbones.networks import inputs_of, tiny_backbone
from tests.diffusion.families.twins import PROMPTS, TWINS, noise_for
from tests.distributed.runs import fit, make_trainer, saved_run, sgd
from tests.distributed.test_checkpoints import assert_equal

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # equal bits in each run; read when CUDA starts

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
)
DEVICES = ["cpu", GPU]
KERNELS = {"cpu": ("math", "flash"), "cuda": ("math", "flash", "efficient", "cudnn")}


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Convolutions in float32, not in TensorFloat-32, which is cuDNN's default."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def on(device: str) -> dict[str, Any]:
    """Options of a trainer with one device."""
    return {"accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1}


def moved(value: Any, device: str) -> Any:
    """A batch, or the inputs of a backbone, on a device."""
    return tuple(part.to(device) for part in value) if isinstance(value, tuple) else value.to(device)


def model_of(kind: str) -> RewardModel:
    """A model whose head, where zero at the start, is not."""
    model = MODULES[kind]().model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.head.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["lrm", "dina"])
def test_scores_are_those_of_the_cpu_and_bfloat16_is_near(kind: str, device: str) -> None:
    prompts, pixels = ["a cat", "a dog", "a cat", "a red car"], pixel_batch(4).chosen
    images = [*((pixels + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()]
    scores = model_of(kind).score(prompts, images)
    exact = model_of(kind).to(device).score(prompts, images)
    torch.testing.assert_close(exact, scores, rtol=1e-4, atol=1e-4)
    narrow = model_of(kind).to(device).set_precision(torch.bfloat16)
    assert any(weight.dtype == torch.bfloat16 for weight in narrow.parameters())
    found = narrow.score(prompts, images)
    assert found.dtype == torch.float32
    assert (found - scores).abs().max() < 0.05 * scores.abs().max()


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU])
@pytest.mark.parametrize("kind", ["lrm", "dina"])
def test_training_ends_near_that_of_the_cpu(kind: str, device: str, tmp_path: Path) -> None:
    modules = [MODULES[kind](optimizer=sgd) for _ in range(2)]
    for module, place in zip(modules, ("cpu", device), strict=True):
        fit(module, make_trainer(tmp_path, **on(place)))
    expected, found = ({name: p.cpu() for name, p in one.named_parameters()} for one in modules)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.rotated), GPU])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_features_and_gradients_of_plain_ones(checkpointing: bool, device: str) -> None:
    plain = tiny_backbone("sd35", tuning="full").to(device)
    compiled = tiny_backbone("sd35", tuning="full", gradient_checkpointing=checkpointing).to(device)
    compile_blocks(compiled.blocks(), backend="aot_eager" if device == "cpu" else "inductor")
    inputs = moved(inputs_of(plain), device)
    for backbone in (plain, compiled):
        visual = backbone(*inputs).visual
        sum(tokens.square().mean() for tokens in visual).backward()
    torch.testing.assert_close(compiled(*inputs).visual, plain(*inputs).visual, rtol=1e-3, atol=1e-4)
    gradients = {name: weight.grad for name, weight in plain.named_parameters()}
    for name, weight in compiled.named_parameters():  # a compiled block gives weights that no feature reads zeros
        found, expected = (torch.zeros_like(weight) if one is None else one for one in (weight.grad, gradients[name]))
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_attention_kernels_agree(device: str) -> None:
    twin, found = TWINS["klein_base"], {}  # heads of 16 channels: some kernels need a multiple of 8
    latents = noise_for(twin.source().resolve_family().latent_shape(*twin.size)).to(device)
    options = {"visual_taps": [1, twin.layers], "text_taps": [1], "tuning": "full"}
    for kernel in KERNELS[device]:
        backbone = create_backbone(
            twin.backbone, source=twin.folder, attention_backend=f"_native_{kernel}", **options
        ).to(device)
        inputs = latents, torch.tensor([300.0, 700.0], device=device), backbone.encode_prompts(list(PROMPTS))
        with torch.autocast(device, torch.bfloat16):
            tokens = backbone(*inputs).visual[-1].float()
        tokens.square().mean().backward()
        found[kernel] = (
            tokens.detach(),
            nn.utils.get_total_norm([weight.grad for weight in backbone.parameters() if weight.grad is not None]),
        )
    tokens, norm = found["math"]
    for kernel, (other, other_norm) in found.items():
        assert (other - tokens).norm() < 0.03 * tokens.norm(), kernel
        assert other_norm.item() == pytest.approx(norm.item(), rel=0.05), kernel


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(device: str, tmp_path: Path) -> None:
    options = {**on(device), "deterministic": "warn"}
    whole = saved_run(tmp_path / "whole", **options)
    resumed = saved_run(tmp_path / "resumed", resume=tmp_path / "whole" / "epoch=0.ckpt", **options)
    for part in ("weights", "average", "moments", "metrics"):
        assert_equal(resumed[part], whole[part], 0.0)


@pytest.mark.parametrize("device", DEVICES)
def test_phases_of_steps_fill_the_time_of_the_device(device: str) -> None:
    weight, began = torch.randn(512, 512, device=device), perf_counter()
    times = StepTimes(cuda=device == "cuda")
    for _ in range(10):
        times.begin("forward")
        weight = (weight @ weight).tanh()
        times.end()
        times.end_step()
        times.read()
    assert weight.isfinite().all()  # waits for the device
    times.read()
    assert times.steps == 10
    assert 0 < times.seconds["forward"] <= sum(times.seconds.values()) <= 1.05 * (perf_counter() - began)
