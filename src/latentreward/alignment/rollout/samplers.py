"""Samplers of a policy: one step and its log-probability, and the settings that choose them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from latentreward.core.contracts import TensorRecord
from latentreward.core.errors import InputError, check_range
from latentreward.diffusion import DDPM_SCHEDULERS, Family
from latentreward.diffusion.noise.processes import ancestral_variance, per_sample, predicted_clean, predicted_noise
from latentreward.diffusion.noise.schedules import check_scheduler, make_scheduler

TIMESTEP_TOLERANCE = 1e-2
"""Largest difference, from rounding, at which two timesteps count as equal; neighbours lie further apart."""
Density = Literal["normal", "squares", "none"]
FlowNoise = Literal["flow", "dance", "cps"]
"""How a flow's step adds noise; see :class:`FlowSDESampler`."""

_REPORT: ContextVar[Callable[[], None] | None] = ContextVar("report", default=None)


@contextmanager
def reporting_steps(report: Callable[[], None]) -> Iterator[None]:
    """Call ``report`` after each step of all sampling inside the block, to show progress."""
    token = _REPORT.set(report)
    try:
        yield
    finally:
        _REPORT.reset(token)


@dataclass(frozen=True)
class Transition(TensorRecord):
    """Gaussian distribution of the next state given the present state, in float32."""

    mean: Tensor  # ``(B, C, ...)`` mean of the next state
    std: Tensor  # ``(B,)`` standard deviation of each element; 0 for a deterministic step
    # ``(B,)`` standard deviation in the KL divergence between two policies. It equals ``std`` for DDIM and ``cps``.
    # For ``flow`` and ``dance`` it is w, not the step's w√|d|, as in Flow-GRPO (arXiv:2505.05470)
    spread: Tensor
    # ``normal``: log-probabilities are those of the Gaussian. ``squares``: they are the negative mean square of
    # next state − mean, as released for coefficients-preserving sampling (arXiv:2509.05952); this ignores the
    # standard deviation. ``none``: no step of the sampler adds noise, so there are none
    density: Density = "normal"

    def sample(self, noise: Tensor) -> Tensor:
        """Return next states ``mean + std·noise`` for noise ``(B, C, ...)``, or ``(K, B, C, ...)`` for K candidates."""
        return self.mean + per_sample(self.std, self.mean) * noise.to(self.mean)

    def log_prob(self, next_latents: Tensor) -> Tensor:
        """Compute the log density of next states, **averaged** over elements (as SPO, LPO and Flow-GRPO do), float32.

        It is ``(B,)`` for states ``(B, C, ...)``, ``(K, B)`` for ``(K, B, C, ...)``; undefined where ``std`` is 0.
        """
        if self.density == "none":
            told = "log_prob: the standard deviation of every step of this sampler is 0, so there is no density"
            raise InputError(f"{told}; make it by Sampling(…).with_noise().sampler(family)")
        # Averaged over elements, where a density adds them up: sums of 16,384 elements would clip every ratio.
        density = -((next_latents.detach().to(self.mean) - self.mean) ** 2)
        if self.density == "normal":
            std = per_sample(self.std, self.mean)
            density = density / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
        return density.flatten(1 - self.mean.ndim).mean(dim=-1)


def inside_window(timesteps: Any, low: float, high: float) -> Any:
    """Tell which of ``timesteps``, a tensor or a number, lie in [low, high], up to rounding, as of shifted levels."""
    return (timesteps >= low - TIMESTEP_TOLERANCE) & (timesteps <= high + TIMESTEP_TOLERANCE)


class StepSampler(ABC):
    """Sampler on a diffusers scheduler's timesteps, whose steps are Gaussian transitions with a log-probability.

    In every method the rows of a batch may be at different timesteps. Arithmetic is float32, also under autocast.

    Attributes:
        timesteps: ``(T,)`` float32 on the CPU, descending: the network's timestep at each step.
        noise_std: ``(T,)`` float32: standard deviation of each step's noise, on which selection thresholds depend.
        noise_setting: Name and value of the setting that scales the noise, for messages.
    """

    timesteps: Tensor
    noise_std: Tensor
    noise_setting: str
    density: Density  # of a step's :class:`Transition`

    def __len__(self) -> int:
        return len(self.timesteps)

    def steps(self) -> Iterator[tuple[int, float]]:
        """Iterate over index and timestep of the steps of a sampling."""
        for step in enumerate(self.timesteps.tolist()):
            yield step
            if (report := _REPORT.get()) is not None:
                report()

    @abstractmethod
    def transition(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Transition:
        """Return the distribution of the next states after ``latents`` ``(B, C, ...)`` at ``timesteps`` ``(B,)``.

        ``model_output`` is that of the (guided) network; timesteps on the CPU avoid a wait for the accelerator.
        """

    @abstractmethod
    def clean(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Tensor:
        """Predict clean latents x̂_0 ``(B, C, ...)``, float32; arguments as in :meth:`transition`."""

    def next_timestep(self, index: int) -> float:
        """Return the timestep of the states after step ``index``; 0 after the last step."""
        return float(self.timesteps[index + 1]) if index + 1 < len(self.timesteps) else 0.0

    def require_noise(self) -> None:
        """Raise InputError if no step adds noise: then there is no log-probability, and all candidates are equal."""
        if not (self.noise_std > 0).any():
            told = f"with sampling.{self.noise_setting} none of the {len(self)} steps adds noise"
            raise InputError(f"{told}, without which there is neither a log-probability nor a choice; raise it")

    def noisy_steps(self, low: float, high: float, least: int = 1) -> list[int]:
        """Return the indices of the steps with noise in [low, high]; raise InputError if fewer than ``least``."""
        self.require_noise()
        inside = inside_window(self.timesteps, low, high) & (self.noise_std > 0)
        if inside.sum() < least:
            raise InputError(
                f"the window low={low:g}, high={high:g} holds {inside.sum()} of the {len(self)} steps, at timesteps "
                f"{self.timesteps[0].item():g} to {self.timesteps[-1].item():g}, with noise, and {least} are needed; "
                "widen it, or raise sampling.num_inference_steps"
            )
        return inside.nonzero().flatten().tolist()

    def step_index(self, timesteps: Tensor) -> Tensor:
        """Return each step's index, int64 on the CPU, from ``timesteps`` ``(B,)``; raise InputError for any other."""
        # On the CPU, where the tables are: timesteps that lie there already cost no wait for the accelerator.
        values = timesteps.detach().to("cpu", torch.float32)
        distance, index = (self.timesteps - values[:, None]).abs().min(dim=1)
        foreign = values[distance > TIMESTEP_TOLERANCE]
        if foreign.numel():
            told = f"timestep {foreign[0].item():g} is none of the {len(self)} steps of this sampler"
            raise InputError(f"{told}; use the sampling settings that the states were drawn with")
        return index

    def _columns(self, table: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """Return the n columns of a ``(T, n)`` table at ``timesteps`` ``(B,)``, which broadcast over ``like``."""
        rows = table[self.step_index(timesteps)].to(like.device)
        return tuple(per_sample(column, like) for column in rows.unbind(dim=1))


class DDIMSampler(StepSampler):
    r"""DDIM sampler (arXiv:2010.02502, eq. 12 and 16), each step of which is a Gaussian transition.

    With a = ᾱ_t, a' = ᾱ of the state that follows, and x̂_0, ε̂ from the network's output,

    .. math::
        s^2 = \eta^2 \frac{1 - a'}{1 - a}\Bigl(1 - \frac{a}{a'}\Bigr), \qquad
        x_{t-1} \sim \mathcal N\bigl(\sqrt{a'}\,\hat x_0 + \sqrt{1 - a' - s^2}\,\hat\varepsilon,\; s^2\bigr).

    Timesteps, ᾱ and the ᾱ after the last step are those of diffusers' ``DDIMScheduler`` with the pipeline's config.
    η = 1 is DDPM's ancestral sampling on these timesteps, η = 0 is deterministic.

    Args:
        scheduler_config: The pipeline's saved scheduler config, of a class of
            :data:`~latentreward.diffusion.DDPM_SCHEDULERS`.
        num_inference_steps: Number of steps T.
        eta: η in [0, 1]: factor on the standard deviation of the ancestral noise.
    """

    def __init__(self, scheduler_config: Mapping[str, Any], num_inference_steps: int, eta: float = 1.0) -> None:
        # Pipelines name PNDM or Euler; DDIM on their betas and spacing is what LPO's code samples with.
        check_scheduler({"_class_name": "DDIMScheduler", **scheduler_config}, DDPM_SCHEDULERS)
        check_range("[0, 1]", "0 is deterministic, 1 ancestral sampling", eta=eta)
        self.prediction_type = scheduler_config.get("prediction_type", "epsilon")
        for name in ("clip_sample", "thresholding"):
            if scheduler_config.get(name):
                raise InputError(f"the scheduler config has {name}=true, which is for pixels; set it to false")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"prediction_type {self.prediction_type!r} is not known; use 'epsilon' or 'v_prediction'")
        from diffusers import DDIMScheduler

        config = {**scheduler_config, "clip_sample": False}
        scheduler = make_scheduler(DDIMScheduler, config, num_inference_steps)
        timesteps, table = scheduler.timesteps, scheduler.alphas_cumprod.double()
        following = timesteps - len(table) // num_inference_steps  # as in its step, for every timestep_spacing
        alpha = table[timesteps]
        alpha_next = torch.where(following >= 0, table[following.clamp(min=0)], scheduler.final_alpha_cumprod.double())
        if self.prediction_type == "epsilon" and not (alpha > 0).all():
            told = "the scheduler config has rescale_betas_zero_snr=true, where prediction_type=epsilon says nothing"
            raise InputError(f"{told}; use a v_prediction pipeline, or timestep_spacing leading")
        variance = ancestral_variance((alpha, 1 - alpha), (alpha_next, 1 - alpha_next), eta)
        # Rounding may leave a tiny negative number at η = 1, where the term is 0.
        std, towards_noise = variance.sqrt(), (1 - alpha_next - variance).clamp(min=0).sqrt()
        columns = [alpha.sqrt(), (1 - alpha).sqrt(), alpha_next.sqrt(), towards_noise, std]
        # Computed in float64: near the last step 1 − ᾱ is a difference of numbers near 1.
        self._table = torch.stack(columns, dim=1).to(torch.float32)
        self.timesteps, self.noise_std = timesteps.to(torch.float32), std.to(torch.float32)
        self.noise_setting, self.density = f"eta={eta:g}", "normal" if eta else "none"

    def transition(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Transition:
        signal, spread, signal_next, towards_noise, std = self._columns(self._table, timesteps, latents)
        seen = latents.float(), model_output.float(), signal, spread
        clean, noise = predicted_clean(self.prediction_type, *seen), predicted_noise(self.prediction_type, *seen)
        return Transition(signal_next * clean + towards_noise * noise, std.flatten(), std.flatten(), self.density)

    def clean(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Tensor:
        signal, spread, _, _, _ = self._columns(self._table, timesteps, latents)
        return predicted_clean(self.prediction_type, latents.float(), model_output.float(), signal, spread)


class FlowSDESampler(StepSampler):
    r"""Sampler that adds noise to the steps of a rectified flow.

    With σ and σ' the levels before and after a step, d = σ' − σ < 0, v the predicted velocity and a = ``noise_level``,
    the kinds ``flow`` (Flow-GRPO, arXiv:2505.05470) and ``dance`` (DanceGRPO, arXiv:2505.07818) are steps of a
    stochastic differential equation with the spread w:

    .. math::
        w = a\sqrt{\sigma / (1 - \sigma)} \text{ or } w = a, \qquad x' \sim \mathcal N\Bigl(
        x\bigl(1 + \tfrac{w^2}{2\sigma} d\bigr) + v\bigl(1 + \tfrac{w^2 (1 - \sigma)}{2\sigma}\bigr) d,\; w^2 |d|\Bigr).

    For ``flow``, the denominator 1 − σ uses the next level where σ = 1, as in Flow-GRPO's code; likewise where 1 − σ is
    less than a hundredth of the step, as at first levels that stand for 1 (UniPC's 1 − 10⁻⁶, Ideogram 4's 1 − 10⁻⁴).
    The equation has the flow's marginals, its published steps only for small d: with a perfect prediction, a = 0.7,
    shift 3 and 10 to 40 steps, the noise's standard deviation is up to 6 % above σ', in the last steps 20 % and more.
    a = 0 gives Euler's step.

    The kind ``cps`` (coefficients-preserving sampling, arXiv:2509.05952) keeps the share of noise in the state at σ':

    .. math::
        s = \sigma' \sin(a\pi/2), \qquad x' \sim \mathcal N\bigl(
        (1 - \sigma')\hat x_0 + \sqrt{\sigma'^2 - s^2}\,\hat\epsilon,\; s^2\bigr),
        \qquad \hat x_0 = x - \sigma v, \quad \hat\epsilon = x + (1 - \sigma) v.

    Its last step has no noise. Its log-probability is the released one: the negative mean square of the noise added.

    Args:
        timesteps: ``(T,)`` timesteps of the family's own schedule, see :meth:`Family.levels
            <latentreward.diffusion.Family.levels>`.
        sigmas: ``(T + 1,)`` noise levels of that schedule, from the noisiest one to 0.
        noise_level: Factor a on the noise, at least 0; Flow-GRPO uses 0.7, DanceGRPO 0.3. At most 1 for ``cps``.
        kind: How noise is added.
    """

    def __init__(self, timesteps: Tensor, sigmas: Tensor, noise_level: float = 0.7, kind: FlowNoise = "flow") -> None:
        check_noise_level(kind, noise_level)
        self.timesteps, self.kind = timesteps, kind
        self.noise_setting = f"noise_level={noise_level:g}"
        sigma, after = sigmas[:-1], sigmas[1:]
        step = after - sigma
        if kind == "cps":
            angle = torch.tensor(noise_level * torch.pi / 2, device=after.device)
            self.noise_std = spread = after * angle.sin().to(after)
            of_noise = (after**2 - spread**2).clamp(min=0).sqrt()
            of_latents, of_velocity = 1 - after + of_noise, of_noise * (1 - sigma) - (1 - after) * sigma
        else:
            spread = noise_level * torch.ones_like(sigma)
            if kind == "flow":
                # Infinite at σ = 1, so the released code takes the level after the step there.
                spread = spread * (sigma / (1 - torch.where(1 - sigma < -step / 100, after, sigma))).sqrt()
            self.noise_std = spread * (-step).sqrt()
            # The released drift, first order in the step; the docstring says how far the marginals are off.
            growth = spread**2 / (2 * sigma)
            of_latents, of_velocity = 1 + growth * step, (1 + growth * (1 - sigma)) * step
        self._table = torch.stack([sigma, of_latents, of_velocity, self.noise_std, spread], dim=1)
        self.density = "squares" if kind == "cps" else "normal" if noise_level else "none"

    def transition(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Transition:
        _, of_latents, of_velocity, std, spread = self._columns(self._table, timesteps, latents)
        mean = of_latents * latents.float() + of_velocity * model_output.float()
        # As in Flow-GRPO's code, the KL divergence takes s, not s√Δ.
        return Transition(mean, std.flatten(), spread.flatten(), self.density)

    def clean(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Tensor:
        sigma = self._columns(self._table, timesteps, latents)[0]
        return predicted_clean("flow", latents.float(), model_output.float(), 1.0 - sigma, sigma)


def check_noise_level(kind: FlowNoise, noise_level: float) -> None:
    """Raise InputError if there is no such kind of noise, or ``noise_level`` is out of its range."""
    if kind not in get_args(FlowNoise):
        raise InputError(f"flow_noise={kind!r} must be one of {', '.join(get_args(FlowNoise))}")
    check_range("[0, inf)", "Flow-GRPO takes 0.7", noise_level=noise_level)
    if kind == "cps":
        check_range("[0, 1]", "flow_noise=cps at 1 replaces all noise; Flow-GRPO takes 0.8", noise_level=noise_level)


ROLLOUT_NOISE: dict[FlowNoise, float] = {"flow": 0.7, "dance": 0.3, "cps": 0.8}
"""Noise of a flow's step in rollouts, as Flow-GRPO, DanceGRPO and Flow-GRPO's CPS configurations set it."""


@dataclass
class Sampling:
    """Number of steps, noise and size of samples.

    Attributes:
        num_inference_steps: Steps from noise to image.
        eta: Noise of a DDIM step (SD1.5, SD2.1, SDXL), in [0, 1]: 0 deterministic, 1 ancestral. None gives 0, and 1 in
            training's rollouts.
        noise_level: Noise of a flow-matching step, at least 0: 0 deterministic. None gives 0, and 0.7 in training's
            rollouts (``dance`` 0.3, ``cps`` 0.8).
        height: Image height in pixels; None for the network's native height.
        width: Image width in pixels; None for the network's native width.
        frames: Number of frames of a clip; 1 for an image.
        flow_noise: How a flow-matching step adds noise: ``flow`` (Flow-GRPO), ``dance`` (DanceGRPO) or ``cps``
            (coefficients-preserving sampling); see :class:`FlowSDESampler`.
    """

    num_inference_steps: int = 20
    eta: float | None = None
    noise_level: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int = 1
    flow_noise: FlowNoise = "flow"

    def __post_init__(self) -> None:
        check_range("[1, inf)", num_inference_steps=self.num_inference_steps)
        check_range("[0, 1]", "0 is deterministic, 1 ancestral sampling", eta=self.eta)
        check_noise_level(self.flow_noise, self.noise_level or 0.0)

    def with_noise(self) -> Self:
        """Return a copy for rollouts, with ``eta`` 1 (LPO) and the noise of :data:`ROLLOUT_NOISE` in place of None."""
        noise_level = ROLLOUT_NOISE[self.flow_noise] if self.noise_level is None else self.noise_level
        return replace(self, eta=1.0 if self.eta is None else self.eta, noise_level=noise_level)

    def latent_shape(self, family: Family) -> tuple[int, ...]:
        """Return the shape of one sample's latents; see :meth:`Family.latent_shape`."""
        return family.latent_shape(self.height, self.width, self.frames)

    def follows_flow(self, family: Family, guidance_scale: float | None) -> bool:
        """Tell whether samples lie on paths of the network itself: those of a flow, without noise and guidance."""
        return family.flow and not self.noise_level and not family.needs_uncond(guidance_scale)

    def require_images(self, reader: str) -> None:
        """Raise InputError if samples are clips, which ``reader`` does not take."""
        if self.frames != 1:
            raise InputError(f"sampling.frames={self.frames}: {reader} takes images, not clips; set it to 1")

    def require_own_noise(self, family: Family) -> None:
        """Raise InputError for noise of DDIM's steps if the family is a flow, and the reverse: it has no effect."""
        own, other = ("noise_level", "eta") if family.flow else ("eta", "noise_level")
        if value := getattr(self, other):
            told = f"sampling.{other}={value:g} has no effect on {family.title}"
            raise InputError(f"{told}; leave it out, or set sampling.{own}")

    def sampler(self, family: Family) -> StepSampler:
        """Make the sampler for a family's pipeline: a flow's SDE at the family's levels, or DDIM."""
        shape = self.latent_shape(family)
        if family.flow:
            with torch.device("cpu"):  # an estimate builds modules on the meta device, whose levels have no values
                levels = family.levels(self.num_inference_steps, shape)
            # Flows sample at the levels of their own pipeline, whose shift may depend on the size.
            return FlowSDESampler(*levels, self.noise_level or 0.0, self.flow_noise)
        if self.flow_noise != "flow":
            raise InputError(f"sampling.flow_noise={self.flow_noise}: {family.title} is no flow; leave it out")
        return DDIMSampler(family.scheduler_config, self.num_inference_steps, self.eta or 0.0)
