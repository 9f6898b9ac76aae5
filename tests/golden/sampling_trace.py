"""What the recorded sampling passes (cases 12 and 13) are replayed with."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentreward.alignment import Policy, RolloutDraws
from latentreward.core.contracts import Conditioning, PromptBatch
from latentreward.diffusion.families.sd import StableDiffusion
from tests.diffusion.families.made_configs import MadeConfigs
from tests.golden.catalogue import Case, Tensors

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


class RecordedDraws(RolloutDraws):
    """Noise and choices of a trace; steps before ``start`` have one noise each."""

    def __init__(self, data: Tensors, start: int) -> None:
        self._data, self._start = data, start

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        assert self._data["init_latents"].shape[1:] == shape
        return self._data["init_latents"]

    def noise(self, index: int, count: int, shape: tuple[int, ...]) -> Tensor:
        if index < self._start:
            return self._data[f"pre_noise_{index}"].reshape(count, -1, *shape)
        return self._data["noise"][index - self._start]

    def choice(self, index: int, count: int) -> Tensor:
        choices, place = self._data["continue_choice"], index - self._start
        return choices[place] if place < len(choices) else torch.zeros(len(choices[0]), dtype=torch.int64)


class RecordedPrompts(nn.Module):
    """A text encoder that knows the rows of a trace, named by their number, and the empty prompt."""

    sees_sources = False

    def __init__(self, data: Tensors) -> None:
        super().__init__()
        self._data = data

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        rows = [self._row("negative_", 0) if prompt == "" else self._row("", int(prompt)) for prompt in prompts]
        return Conditioning(*(torch.stack(parts) for parts in zip(*rows, strict=True)))

    def _row(self, prefix: str, row: int) -> tuple[Tensor, Tensor]:
        pooled = f"{prefix}pooled_prompt_embeds"
        tokens = self._data[f"{prefix}prompt_embeds"][row]
        return tokens, self._data[pooled][row] if pooled in self._data else tokens[0]


def prompts_of(case: Case) -> PromptBatch:
    names = tuple(str(row) for row in range(case.options["batch"]))
    return PromptBatch(names, names)


def checkpoint_of(case: Case) -> Path:
    return case.path.parent / case.options["checkpoint"]


def policy_of(case: Case, data: Tensors) -> Policy:
    """The checkpoint's whole U-Net, with the recorded prompts."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(checkpoint_of(case) / "unet", torch_dtype=torch.float32)
    scale = case.options.get("vae_scaling_factor", 0.18215)
    vae = {"latent_channels": unet.config.in_channels, "block_out_channels": [1] * 4, "scaling_factor": scale}
    family = StableDiffusion(MadeConfigs({"unet": dict(unet.config), "vae": vae, "scheduler": SCHEDULER}))
    return Policy(unet, family, RecordedPrompts(data)).eval()


class Calls:
    """What a U-Net is called with: timestep, and the latents of the conditional half."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.calls: list[tuple[float, Tensor]] = []
        self.extra: list[dict[str, Tensor]] = []
        unet.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        assert len(args[1].unique()) == 1
        unconditional, conditional = args[0].chunk(2)
        assert torch.equal(unconditional, conditional)
        self.calls.append((args[1][0].item(), conditional))
        self.extra.append(options.get("added_cond_kwargs") or {})

    def __iter__(self) -> Iterator[tuple[float, Tensor]]:
        return iter(self.calls)
