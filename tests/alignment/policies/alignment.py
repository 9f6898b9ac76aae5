"""The smallest alignment module, and the predictions that tests compare."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from latentreward.alignment import AlignmentModule, Policy, PolicySource
from latentreward.diffusion import LoRA
from tests.tiny_pipelines import pipeline_folder


def tiny_source(name: str, **options: Any) -> PolicySource:
    """A pipeline of :mod:`tests.tiny_pipelines`."""
    return PolicySource(**{"source": pipeline_folder(name), "lora": LoRA(2, 4.0), "t5_length": 4, **options})


def states(policy: Policy, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """A random latent for each prompt, the same wherever it is drawn, and timesteps."""
    drawn = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
    latents = torch.stack([torch.randn(policy.latent_shape(), generator=generator) for generator in drawn])
    return latents, torch.full((len(prompts),), 500.0)


def prediction(policy: Policy, prompts: Sequence[str] = ("a cat", "two dogs")) -> Tensor:
    """The policy's output, without gradient."""
    with torch.no_grad():
        return policy.predict(*states(policy, prompts), policy.encode_prompts(prompts))


class Matching(AlignmentModule):
    """Moves predictions away from the reference's; every path that alignment takes is in it.

    The adapter starts with B = 0, where A has no gradient; a constant shift gives it one from the second step on.
    """

    def __init__(self, policy: PolicySource, **options: Any) -> None:
        super().__init__(policy, **{"optimizer": lambda groups: SGD(groups, lr=0.05), "guidance_scale": 1.0, **options})

    def training_step(self, batch: Sequence[str], batch_idx: int) -> Tensor:
        latents, timesteps = (value.to(self.device) for value in states(self.policy, batch))
        conditioning = self.policy.encode_prompts(batch)
        with torch.no_grad(), self.policy.reference():
            target = self.policy.predict(latents, timesteps, conditioning) + 1
        return (self.policy.predict(latents, timesteps, conditioning) - target).float().square().mean()


def perturbed(policy: Policy) -> Policy:
    """The policy with random values in all of its adapter, as if trained."""
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return policy
