"""Interfaces of rewards: the source, which knows the latent space before loading, and the loaded reward."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from latentreward.core.contracts import LatentSpace, NoisyStates, PromptBatch
from latentreward.core.errors import InputError
from latentreward.core.promises import Part, detached, of_class, returns, shown, unchanged, wrong_tensor
from latentreward.core.running import pair_generator, phase

if TYPE_CHECKING:
    from latentreward.alignment.policies.loading import PolicySource
    from latentreward.alignment.policies.policy import Policy


class Reward(nn.Module, Part):
    """A loaded, frozen reward that scores sampling states; a higher score is better.

    It must not register modules of the policy as its own submodules.

    Attributes:
        needs_clean: Whether the reward needs :attr:`NoisyStates.clean`, the policy's prediction of the clean latents.
        differentiable: Whether scores carry a gradient to ``states.latents`` (or ``states.clean``).
        changes_buffers: Whether scoring changes buffers of the reward; checkpoints of trainable weights then hold
            these buffers too. Alignment sets it for a module whose buffers the first scores change.
        answers_later: Whether :meth:`begin_parts` returns before the scores are there.
        name: Name in messages; empty for that of the class.
    """

    needs_clean: bool = False
    differentiable: bool = False
    changes_buffers: bool = False
    answers_later: bool = False
    name: str = ""

    def train(self, mode: bool = True) -> Self:
        """Keep evaluation mode, also when the surrounding module is set to training mode."""
        return super().train(False)

    def take_means(self) -> Tensor | None:
        """Return the mean score of each reward of a mixture since the last call, ``(R,)``; None for other rewards."""
        return None

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise InputError if the reward does not take one of a run's prompts; the weights may not be read yet."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        """Encode P raw prompts once, for many calls of :meth:`score`; each reward chooses the type of the result."""

    @abstractmethod
    def score(self, states: NoisyStates, encoded: Any) -> Tensor:
        """Score N states: ``(N,)``, float32; ``states.rows`` are the indices of their prompts in ``encoded``."""

    @returns(
        lambda found, reward, latents, *given: (
            wrong_tensor(found, (len(latents),)) or ((reward.differentiable or None) and detached(found, latents))
        ),
    )
    def score_clean(
        self, latents: Tensor, rows: Tensor, encoded: Any, noise: Tensor | None = None, sigmas: Sequence[float] = ()
    ) -> Tensor:
        """Score finished latents ``(N, C, ...)``, clean and scaled: ``(N,)``, float32.

        A latent reward adds standard normal ``noise`` ``(N, C, ...)`` at each of the levels ``sigmas`` in [0, 1] before
        it scores, and several give one ensemble score; rewards on pixels ignore both.
        """
        return self(NoisyStates(latents, torch.zeros(len(latents), device=latents.device), rows, latents), encoded)

    def begin_parts(
        self, latents: Tensor, rows: Tensor, encoded: Any, noise: Tensor | None = None, sigmas: Sequence[float] = ()
    ) -> Callable[[], Tensor]:
        """Begin to score as :meth:`score_clean`, and return a function that waits for scores ``(N, R)``.

        They are those of each reward of a mixture, not weighted. Only a reward with :attr:`answers_later` works in the
        meantime. The functions are to be called in the order of the calls of this method.
        """
        with unchanged(f"reward {self.name or type(self).__name__}", latents):
            parts = self.score_clean(latents, rows, encoded, noise, sigmas)[:, None]
        return lambda: parts

    def mix(self, parts: Tensor, rows: Tensor) -> Tensor:
        """Compute the score ``(N,)`` from those of :meth:`begin_parts`; ``rows`` ``(N,)`` are the states' prompts."""
        return parts[:, 0]

    def mix_apart(self, parts: Tensor, spread: Tensor) -> Tensor:
        """Compute scores ``(N,)`` of different prompts; a mixture that normalises divides by ``spread`` ``(R,)``."""
        return self.mix(parts, torch.arange(len(parts)))

    def set_precision(self, dtype: torch.dtype) -> None:
        """Set the type in which frozen weights are stored and multiplied, before they are moved; scores stay float32.

        By default nothing happens: the trainer's autocast decides.
        """

    def forward(self, states: NoisyStates, encoded: Any) -> Tensor:
        """Call :meth:`score` and check the result, see :meth:`checked`; the states must stay as they are."""
        with unchanged(f"reward {self.name or type(self).__name__}", states):
            scores = self.score(states, encoded)
        return self.checked(scores, states.timesteps, states.latents)

    def checked(self, scores: Tensor, timesteps: Tensor, latents: Tensor) -> Tensor:
        """Check ``scores`` of ``latents`` ``(N, C, ...)`` at ``timesteps`` ``(N,)``, and return them in float32."""
        count, name = len(timesteps), self.name or type(self).__name__
        if not isinstance(scores, Tensor) or scores.shape != (count,):
            raise InputError(f"reward {name} returned {shown(scores)} for {count} states, not a tensor ({count},)")
        if self.differentiable and (problem := detached(scores, latents)):
            raise InputError(f"reward {name} with differentiable = True returned {problem}")
        if not scores.isfinite().all():
            bad = scores[~scores.isfinite()][0].item()
            if not latents.isfinite().all():
                raise InputError("the policy's sampler gave latents that are not finite; lower the learning rate")
            at = timesteps[~scores.isfinite()][0].item()
            raise InputError(f"reward {name} returned {bad} at timestep {at:g}; look at its weights")
        return scores.float()


class RewardSource(Part):
    """Settings of a reward, as given in YAML. Weights are loaded by :meth:`load` only.

    Attributes:
        part_weights: Weights of the rewards of a mixture, one for each; of any other reward a single one.
    """

    part_weights: Sequence[float] = (1.0,)

    def has_gradient(self) -> bool:
        """Tell whether scores carry a gradient to the states, as far as that is known before loading."""
        return True

    def remembers(self) -> bool:
        """Tell whether a score depends on what was scored before."""
        return False

    @abstractmethod
    @returns(of_class(LatentSpace, also_none=True))
    def latent_space(self) -> LatentSpace | None:
        """Read the latent space that the reward takes from its configs; None if any policy's latents will do."""

    def require_latents_of(self, policy: PolicySource) -> None:
        """Raise InputError, before any weight is loaded, if the reward does not take the latents of ``policy``."""
        theirs = self.latent_space()  # first: a missing checkpoint is named before diffusers is imported
        if theirs is not None and (ours := policy.latent_space()) != theirs:
            raise InputError(
                f"the policy {policy.source} makes latents of the space [{ours}], but the reward takes [{theirs}]; use "
                "a reward trained on latents of the policy's VAE, or one that scores pixels"
            )

    def scores_states(self) -> bool:
        """Tell whether the reward scores a noisy state as it is, without the policy's prediction of clean latents."""
        return True

    def judges_alone(self) -> bool:
        """Tell whether the score of a state depends on this state alone, and not on others of the same call."""
        return True

    def require_guidance(self) -> None:
        """Raise InputError, before any weight is loaded, if the reward cannot guide a rollout by its gradient."""
        self.require_step_scores("reward_guidance")
        self.require_alone("reward_guidance follows the gradient of each state's own score")
        self.require_gradient("reward_guidance")

    def require_alone(self, reason: str) -> None:
        """Raise InputError if a score depends on others; ``reason`` begins the line."""
        if not self.judges_alone():
            told = f"{type(self).__name__} normalises scores within a prompt"
            raise InputError(f"{reason}, and {told}; set normalise: none or running")

    def require_gradient(self, field: str) -> None:
        """Raise InputError if scores lack the gradient that ``field`` needs."""
        if not self.has_gradient():
            raise InputError(f"{field} needs the gradient of the reward, and {type(self).__name__} has none")

    def require_step_scores(self, field: str) -> None:
        """Raise InputError if ``field`` is set and the reward scores no noisy states."""
        if not self.scores_states():
            told = f"{field} needs the score of a noisy state"
            raise InputError(f"{told}, which {type(self).__name__} does not give; take a LatentReward, or leave it out")

    @abstractmethod
    @returns(of_class(Reward))
    def load(self, policy: Policy) -> Reward:
        """Load the reward, frozen, to score states of ``policy``."""


def check_edits(name: str, reward: tuple[int, int | None], policy: tuple[int, int | None]) -> None:
    """Raise InputError if one of reward and policy, of which these are the ``sources``, must edit and one cannot."""
    if (0, 0) in (reward, policy) and (reward[0] or policy[0]):
        text, edits = "pictures made from text alone", "edits of pictures"
        judged, made = (edits, text) if reward[0] else (text, edits)
        raise InputError(f"{name}: it judges {judged}, and the policy makes {made}; give a reward trained on those")


def check_sigmas(sigmas: Sequence[float], field: str = "reward_sigmas") -> None:
    """Raise InputError, which names ``field``, if there are no noise levels, or one is outside [0, 1] or repeated."""
    if not sigmas or len(set(sigmas)) < len(sigmas) or not all(0.0 <= sigma <= 1.0 for sigma in sigmas):
        raise InputError(f"{field}={list(sigmas)} must be at least one noise level in [0, 1], each once")


@phase("reward")
def score_states(
    reward: Reward, encoded: Any, latents: Tensor, rows: Tensor, timestep: float, clean: Tensor | None = None
) -> Tensor:
    """Score states ``(N, C, ...)`` that are all at one timestep of the policy: ``(N,)``; see :meth:`Reward.score`."""
    timesteps = torch.full((len(latents),), timestep, device=latents.device)
    scores: Tensor = reward(NoisyStates(latents, timesteps, rows.to(latents.device), clean), encoded)
    return scores


@phase("reward")
def score_finished(reward: Reward, latents: Tensor, prompts: PromptBatch, seed: int, sigmas: Sequence[float]) -> Tensor:
    """Score finished latents: ``(N,)``, float32.

    A reward that scores noisy latents adds noise of ``seed`` at the levels ``sigmas``. All samples of a prompt share
    that noise, so that their scores differ only because of the samples. Latents are ``(N, C, ...)``, first the N / P
    samples of the first of P prompts.
    """
    return reward.score_clean(*_scoring_inputs(reward, latents, prompts, seed), sigmas).float()


@phase("reward")
def begin_finished(
    reward: Reward, latents: Tensor, prompts: PromptBatch, seed: int, sigmas: Sequence[float]
) -> Callable[[], Tensor]:
    """Begin to score finished latents by each reward of a mixture; see :meth:`Reward.begin_parts`."""
    begun = reward.begin_parts(*_scoring_inputs(reward, latents, prompts, seed), sigmas)
    return phase("reward")(lambda: begun().float())


def _scoring_inputs(
    reward: Reward, latents: Tensor, prompts: PromptBatch, seed: int
) -> tuple[Tensor, Tensor, Any, Tensor]:
    """Return latents, rows, encoded prompts and noise, as :meth:`Reward.score_clean` takes them."""
    # One noise for all samples of a prompt: it cancels in their comparison.
    generators = [pair_generator(seed, "reward noise", 0, key) for key in prompts.keys]
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    rows = rows_of(prompts, latents)
    with torch.no_grad():
        encoded = reward.encode_prompts(prompts.prompts)
    return latents, rows, encoded, noise.to(latents.device)[rows]


def rows_of(prompts: PromptBatch, latents: Tensor) -> Tensor:
    """Return the index of the prompt of each of ``latents`` ``(N, C, ...)``, of which each prompt has N / P in turn."""
    return torch.arange(len(prompts)).repeat_interleave(len(latents) // len(prompts)).to(latents.device)
