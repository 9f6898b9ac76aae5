"""Check of a model folder that was just written: load it and compare it with the model in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from latentreward.core.checkpoints.base_weights import sample
from latentreward.core.errors import InputError
from latentreward.diffusion.encoders.vae import edit_of_grey
from latentreward.reward.scoring.batched_scoring import score_given_latents
from latentreward.reward.scoring.layouts.model_folder import PretrainedReward
from latentreward.reward.scoring.layouts.recipe import ModelPart, ModelRecipe, is_ours
from latentreward.reward.scoring.network import RewardNetwork

PROMPTS = ("a red cube on a blue sphere", "") * 2  # a CPU's batches have four rows or one, see ``ROWS``
SIDE = 256  # side, in pixels, of the square images whose latent size the check uses
RELATIVE, ABSOLUTE = 1e-4, 1e-5
"""Tolerances for scores: an accelerator may choose other kernels for the second copy of the model."""


@dataclass(frozen=True)
class Probe:
    """Sampled weights and four scores of a model, small enough to keep after the model itself is freed."""

    recipe: ModelRecipe  # recipe of the model, with the base that it was loaded on
    weights: dict[str, Tensor]  # A few values of each parameter and buffer, by name
    # Scores of four random latents with a fixed seed, in the size of a square image that the model has resized:
    # ``(4,)`` or ``(4, out_dim)``; None if the model has no rule for image sizes
    scores: Tensor | None

    @property
    def summary(self) -> str:
        """Description of a successful comparison, for messages."""
        return "equal weights" if self.scores is None else "equal weights and scores"

    @classmethod
    def of(cls, model: RewardNetwork) -> Self:
        """Sample the weights of ``model`` and compute its scores; raise ValueError if the model has no recipe."""
        if model.recipe is None:
            raise ValueError("the model has no recipe")
        named = chain(model.named_parameters(), model.named_buffers())
        weights = {name: sample(tensor.detach()) for name, tensor in named if tensor.numel()}
        if model.image_sizes is None:
            return cls(model.recipe, weights, None)
        loader, space = model.image_sizes.loader(SIDE, SIDE), model.backbone.latent_space
        shape = (len(PROMPTS), *space.shape(loader.height, loader.width, model.image_sizes.frames))
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        prompts = [edit_of_grey(prompt, model.backbone.sources[0]) for prompt in PROMPTS]
        scores = score_given_latents(model, prompts, latents, model.noise, None, None, len(PROMPTS))
        return cls(model.recipe, weights, scores.cpu())

    def compare(self, folder: Path, device: torch.device, trusted: bool) -> None:
        """Load ``folder`` as another user would, but on this machine's copy of the base; compare weights and scores.

        Raises:
            InputError: If the folder does not load, or a weight or a score differs.
        """
        stored = PretrainedReward(folder, None, trusted)
        built = self.recipe.backbone
        here = {name: built.init_args[name] for name in ("source", "revision") if name in built.init_args}
        named = stored.recipe.backbone
        settings = {name: value for name, value in named.init_args.items() if name not in ("source", "revision")}
        stored.recipe = replace(stored.recipe, backbone=ModelPart(named.name, settings | here))
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)  # to detect weights that a factory draws from the global generator
                again = Probe.of(stored.load(RewardNetwork).to(device).set_precision(torch.float32))
        except InputError as error:
            raise InputError(f"the model does not load again once it is saved: {error}") from error
        for name in sorted(self.weights.keys() | again.weights.keys()):
            ours, theirs = self.weights.get(name), again.weights.get(name)
            if ours is None or theirs is None or not torch.equal(ours, theirs):
                raise InputError(
                    f"{name} differs once the model is saved and loaded again; "
                    + ("report it" if is_ours(built) else f"{built.name} must give it the same value at each start")
                )
        if self.scores is None or again.scores is None:
            return
        if not torch.allclose(again.scores, self.scores, rtol=RELATIVE, atol=ABSOLUTE):
            first, second = (scores.flatten()[0].item() for scores in (self.scores, again.scores))
            raise InputError(
                f"the score is {second:.6g} instead of {first:.6g} once the model is saved and loaded again; keep what "
                "its backbone and head compute with in parameters, buffers or settings, and draw nothing at random"
            )
