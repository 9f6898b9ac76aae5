"""Adapters of every family: all of them train, and their files load in diffusers' pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch

from latentreward.alignment import Policy, TrainedLoRA, write_kohya
from latentreward.alignment.export.lora import KOHYA_FILE as FILE
from latentreward.apps.generation.lora import load_lora
from latentreward.core.errors import InputError
from latentreward.diffusion import LoRA
from tests.alignment.policies.alignment import perturbed
from tests.diffusion.families.twins import PROMPTS, TWINS, Twin, every_network, noise_for


def moved(twin: Twin, **options: Any) -> Policy:
    """A policy whose adapter does something; alpha differs from rank."""
    return perturbed(twin.source(lora=LoRA(2, 5.0), **options).load()).eval()


def output(policy: Policy, twin: Twin) -> torch.Tensor:
    latents = noise_for(policy.latent_shape(*twin.size))
    return policy.predict(latents, torch.tensor([300.0, 800.0]), policy.encode_prompts(PROMPTS))


@every_network
def test_every_adapter_has_a_gradient(twin: Twin) -> None:
    policy = moved(twin)
    output(policy, twin).square().mean().backward()
    last = f"{len([*policy.blocks()]) - 1}.attn.add_q_proj" if twin.family == "sd3" else "none"
    for name, weight in policy.named_parameters():
        if last in name:  # SD3's last block has no output for text, but earlier releases have adapters there
            assert weight.grad is None or not weight.grad.any()
        elif weight.requires_grad:
            assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), name
        else:
            assert weight.grad is None, name


@pytest.mark.slow
@every_network
def test_gradient_checkpointing_changes_no_gradient(twin: Twin) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = moved(twin, gradient_checkpointing=checkpointing).train()
        output(policy, twin).square().mean().backward()
        gradients.append([weight.grad for weight in policy.parameters() if weight.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


@every_network
def test_the_exported_file_loads_in_diffusers_and_here(twin: Twin, tmp_path: Path) -> None:
    policy = moved(twin)
    file = TrainedLoRA.of_policy(policy).write_diffusers(tmp_path)
    pipeline = twin.pipeline()
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    again = twin.source().load()
    load_lora(again, tmp_path)
    with torch.no_grad():
        want = output(policy, twin)
        torch.testing.assert_close(output(again.eval(), twin), want, rtol=1e-4, atol=1e-5)
        policy.network = getattr(pipeline, policy.family.part)
        torch.testing.assert_close(output(policy, twin), want, rtol=1e-4, atol=1e-5)


def test_kohyas_format_exists_only_where_programs_need_it(tmp_path: Path) -> None:
    twin, other = TWINS["wan21"], TWINS["z_image"]
    with pytest.raises(InputError, match="format=kohya"):
        write_kohya(TrainedLoRA.of_policy(moved(other)), tmp_path)
    policy, pipeline = moved(twin), twin.pipeline()
    write_kohya(TrainedLoRA.of_policy(policy), tmp_path)
    pipeline.load_lora_weights(tmp_path, weight_name=FILE)
    with torch.no_grad():
        want = output(policy, twin)
        policy.network = getattr(pipeline, policy.family.part)
        torch.testing.assert_close(output(policy, twin), want, rtol=1e-4, atol=1e-5)
