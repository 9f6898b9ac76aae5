"""Rewards without a trained model: a function of the user's, random controls, and one against edits that change all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from latentreward.alignment.rewards.base import Reward, RewardSource
from latentreward.core.contracts import NoisyStates, sources_of
from latentreward.core.errors import InputError, check_range
from latentreward.core.promises import place_of
from latentreward.core.running import pair_generator
from latentreward.core.storage.digests import digest

if TYPE_CHECKING:
    from latentreward.alignment.policies.policy import Policy

READOUT_CHANNELS = 32  # output channels of the random convolution of ``RandomReward(kind="readout")``


class CallableReward(RewardSource):
    """A reward computed by any function of latents.

    Args:
        function: Called as ``function(latents, timesteps, prompts)`` with ``(N, C, ...)``, ``(N,)`` and N raw prompts,
            and with ``clean=`` ``(N, C, ...)`` too under ``needs_clean``; returns scores ``(N,)``, higher is better. It
            must not change the tensors in place.
        needs_clean: Whether the function needs ``clean``, the policy's prediction of the clean latents.
        differentiable: Whether the scores carry a gradient to the latents (or to ``clean``), as ReFL needs.

    Example:
        .. code-block:: yaml

            reward: {class_path: CallableReward, init_args: {function: my_rewards.saturation}}
    """

    def __init__(self, function: Callable[..., Any], needs_clean: bool = False, differentiable: bool = False) -> None:
        self.function, self.needs_clean, self.differentiable = function, needs_clean, differentiable

    def has_gradient(self) -> bool:
        return self.differentiable

    def latent_space(self) -> None:
        """Return None: latents of any policy are passed to the function."""

    def scores_states(self) -> bool:
        return not self.needs_clean

    def load(self, policy: Policy) -> FunctionReward:
        name = f"{type(self).__name__}{place_of(self.function)}"
        return FunctionReward(self.function, self.needs_clean, self.differentiable, name)


class FunctionReward(Reward):
    """The loaded reward of :class:`CallableReward` and :class:`RandomReward`."""

    def __init__(
        self, function: Callable[..., Tensor], needs_clean: bool, differentiable: bool, name: str = "RandomReward"
    ) -> None:
        super().__init__()
        self.function, self.needs_clean, self.differentiable = function, needs_clean, differentiable
        self.name = name

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[str, ...]:
        return tuple(prompts)

    def score(self, states: NoisyStates, encoded: tuple[str, ...]) -> Tensor:
        prompts = [encoded[row] for row in states.rows.tolist()]
        clean = {"clean": states.clean} if self.needs_clean else {}
        return self.function(states.latents, states.timesteps, prompts, **clean)


class RandomReward(RewardSource):
    """A random reward, as a control experiment: gains that occur with this reward too are not due to a learned reward.

    Args:
        kind: ``noise`` scores every state with an independent number from N(0, ``scale``²), so that there is nothing to
            learn. ``readout`` is a fixed random function of the latents, which can be learned but has no meaning: a
            random convolution, tanh, mean over positions and a random linear layer; it is differentiable. The score
            of a clip is the mean over its frames.
        seed: Seed of the numbers or of the function.
        scale: Standard deviation of the scores: of all scores under ``noise``, of the scores of images of pure noise
            under ``readout``. Candidates drawn from one state differ less than that under ``readout``.
    """

    def __init__(self, kind: Literal["noise", "readout"] = "noise", seed: int = 0, scale: float = 1.0) -> None:
        check_range("(0, inf)", **{"reward.scale": scale})
        self.kind, self.seed, self.scale = kind, seed, scale

    def has_gradient(self) -> bool:
        return self.kind == "readout"

    def latent_space(self) -> None:
        """Return None: latents of any policy are scored."""

    def load(self, policy: Policy) -> FunctionReward:
        if self.kind == "noise":
            return FunctionReward(self._number, needs_clean=False, differentiable=False)
        channels, generator = policy.latent_space.channels, pair_generator(self.seed, "random readout", 0, "")

        def read(latents: Tensor) -> Tensor:
            with torch.autocast(latents.device.type, enabled=False):
                frames = latents.float().movedim(1, -3).flatten(0, -4)  # of a clip, each by itself
                maps = torch.tanh(F.conv2d(frames, weight.to(latents.device), bias.to(latents.device)))
                read_out = maps.mean(dim=(2, 3)).reshape(len(latents), -1, READOUT_CHANNELS).mean(dim=1)
                return read_out @ mix.to(latents.device)

        with torch.device("cpu"):  # also where a policy without weights is loaded, on the meta device
            weight = torch.randn(READOUT_CHANNELS, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
            bias, mix = torch.randn(2, READOUT_CHANNELS, generator=generator)
            spread = read(torch.randn(256, channels, 8, 8, generator=generator)).std().item()
        return FunctionReward(
            lambda latents, timesteps, prompts: read(latents) * (self.scale / spread),
            needs_clean=False,
            differentiable=True,
        )

    def _number(self, latents: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        numbers = []
        for state, timestep, prompt in zip(latents.detach().float().cpu(), timesteps.tolist(), prompts, strict=True):
            content = digest([state.contiguous().numpy()], 64)
            generator = pair_generator(self.seed, "random reward", 0, json.dumps([prompt, timestep]), content)
            numbers.append(torch.randn((), generator=generator))
        return self.scale * torch.stack(numbers).to(latents.device)


def unchanged_region_change(latents: Tensor, sources: Tensor, share: float = 0.5) -> Tensor:
    """Compute how much the least changed region of edits differs from the pictures that were edited: ``(N,)`` float32.

    An edit of part of a picture leaves other places alone; where everything moves, the edit did more than it was asked
    to. At each place the change is the mean square of the difference over channels. The measure is the root mean of
    the smallest ``share`` of these: 0 if at least this share of the picture is unchanged. Scaled latents have a
    variance of about 1, so that two unrelated pictures are about 1 apart. An instruction that changes all places, such
    as one for the style, has a large value by right: compare results of one prompt.

    Results ``latents``, in which the measure is differentiable, and ``sources`` are clean latents ``(N, C, ...)``.
    """
    if latents.shape != sources.shape:
        raise InputError(
            f"edited latents {tuple(latents.shape[1:])} and those of their source {tuple(sources.shape[1:])} differ in "
            "size; set policy.source_size: made"
        )
    changes = (latents.float() - sources.float()).square().mean(dim=1).flatten(1)
    count = max(round(share * changes.shape[1]), 1)
    # The small constant keeps the gradient of the root finite where nothing has changed.
    return (changes.topk(count, dim=1, largest=False).values.mean(dim=1) + 1e-12).sqrt()


class UnchangedRegion(RewardSource):
    """Reward against over-editing: minus the change of the region that an edit leaves alone, for editors.

    See :func:`~latentreward.alignment.rewards.callable.unchanged_region_change`. The best score, 0, is that of an
    unchanged picture, so the reward is one part of a mixture with a reward that judges the edit. A noisy state is
    scored by the policy's prediction of its clean latents.

    Args:
        share: Share of the places that an edit may be expected to leave alone.
        source: Number of the picture that is edited, of prompts with several; from 0.

    Example:
        .. code-block:: yaml

            reward:
              class_path: RewardMixture
              init_args:
                rewards:
                  - {class_path: LatentReward, init_args: {path: runs/edit_reward}}
                  - {class_path: UnchangedRegion}
                weights: [1.0, 0.5]
    """

    def __init__(self, share: float = 0.5, source: int = 0) -> None:
        check_range("(0, 1]", **{"reward.share": share})
        check_range("[0, inf)", **{"reward.source": source})
        self.share, self.source = share, source

    def latent_space(self) -> None:
        """Return None: latents of any editor are compared with those of its sources."""

    def scores_states(self) -> bool:
        return False

    def load(self, policy: Policy) -> LoadedUnchangedRegion:
        if policy.source_encoder is None:
            raise InputError(f"reward UnchangedRegion is for policies that edit; {policy.family.title} does not")
        return LoadedUnchangedRegion(policy, self.share, self.source)


class LoadedUnchangedRegion(Reward):
    """The loaded reward of :class:`UnchangedRegion`."""

    needs_clean = differentiable = True
    name = "UnchangedRegion"

    def __init__(self, policy: Policy, share: float, source: int) -> None:
        super().__init__()
        self._policy = (policy,)  # not registered here as well
        self.share, self.source = share, source

    def check_prompts(self, prompts: Sequence[str]) -> None:
        if any(len(sources_of(prompt)) <= self.source for prompt in prompts):
            remedy = "give source: 0" if self.source else "give prompts with source_images"
            raise InputError(f"reward UnchangedRegion: a prompt edits no picture number {self.source}; {remedy}")

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        self.check_prompts(prompts)
        encoder = self._policy[0].source_encoder
        assert encoder is not None
        return encoder(prompts)[self.source]

    def score(self, states: NoisyStates, encoded: Tensor) -> Tensor:
        assert states.clean is not None
        sources = encoded.to(states.clean.device)[states.rows.to(states.clean.device)]
        return -unchanged_region_change(states.clean, sources, self.share)
