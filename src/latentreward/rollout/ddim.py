"""DDIM sampler with noise, for SD1.5, SD2.1, SDXL and other variance-preserving pipelines."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentreward.errors import InputError
from latentreward.noise.predictions import ancestral_variance, predicted_clean, predicted_noise
from latentreward.noise.schedules import DDPM_SCHEDULERS, check_scheduler, make_scheduler
from latentreward.rollout.base import StepSampler
from latentreward.rollout.transition import Transition


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
            :data:`~latentreward.noise.schedules.DDPM_SCHEDULERS`.
        num_inference_steps: Number of steps T.
        eta: η in [0, 1]: factor on the standard deviation of the ancestral noise.

    Raises:
        InputError: If the scheduler is of another class or cannot make ``num_inference_steps`` steps, ``eta`` is so
            large that the mean's noise term would be imaginary, or the config has a setting that does not suit latents
            (``clip_sample``, ``thresholding``, ``prediction_type`` ``sample``).
    """

    def __init__(self, scheduler_config: Mapping[str, Any], num_inference_steps: int, eta: float = 1.0) -> None:
        check_scheduler({"_class_name": "DDIMScheduler", **scheduler_config}, DDPM_SCHEDULERS)
        self.prediction_type = scheduler_config.get("prediction_type", "epsilon")
        for name in ("clip_sample", "thresholding"):
            if scheduler_config.get(name):
                raise InputError(
                    f"the scheduler config has {name}=true, which is for pixels and spoils latents; set it to false"
                )
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"prediction_type {self.prediction_type!r} is not known; use 'epsilon' or 'v_prediction'")
        timesteps, alpha, alpha_next = _schedule(scheduler_config, num_inference_steps)
        if self.prediction_type == "epsilon" and not (alpha > 0).all():
            raise InputError(
                "the scheduler config has rescale_betas_zero_snr=true with prediction_type='epsilon', which predicts "
                "nothing at pure noise; use a v_prediction pipeline, or timestep_spacing 'leading'"
            )
        variance = ancestral_variance((alpha, 1 - alpha), (alpha_next, 1 - alpha_next), eta)
        room = 1 - alpha_next - variance
        if not (room >= -1e-6).all():
            raise InputError(f"sampling.eta={eta:g} is more noise than a step of DDIM has room for; use at most 1")
        std, towards_noise = variance.sqrt(), room.clamp(min=0).sqrt()
        columns = [alpha.sqrt(), (1 - alpha).sqrt(), alpha_next.sqrt(), towards_noise, std]
        self._table = torch.stack(columns, dim=1).to(torch.float32)
        self.timesteps, self.noise_std = timesteps.to(torch.float32), std.to(torch.float32)
        self.noise_setting = f"eta={eta:g}"

    def transition(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Transition:
        """See :meth:`StepSampler.transition`."""
        signal, spread, signal_next, towards_noise, std = self._columns(self._table, timesteps, latents)
        seen = latents.float(), model_output.float(), signal, spread
        clean, noise = predicted_clean(self.prediction_type, *seen), predicted_noise(self.prediction_type, *seen)
        return Transition(signal_next * clean + towards_noise * noise, std.flatten(), std.flatten())

    def clean(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Tensor:
        """See :meth:`StepSampler.clean`."""
        signal, spread, _, _, _ = self._columns(self._table, timesteps, latents)
        return predicted_clean(self.prediction_type, latents.float(), model_output.float(), signal, spread)


def _schedule(config: Mapping[str, Any], num_inference_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the timesteps of diffusers' scheduler, and ᾱ before and after each step, all ``(T,)``, ᾱ in float64."""
    from diffusers import DDIMScheduler

    scheduler = make_scheduler(DDIMScheduler, {**config, "clip_sample": False}, num_inference_steps)
    timesteps, table = scheduler.timesteps, scheduler.alphas_cumprod.double()
    levels = len(table)
    if timesteps[0] >= levels:
        raise InputError(
            f"num_inference_steps={num_inference_steps} with the scheduler's steps_offset reaches timestep "
            f"{timesteps[0]} of {levels}; use fewer steps"
        )
    following = timesteps - levels // num_inference_steps  # as in DDIMScheduler.step, for every timestep_spacing
    after = torch.where(following >= 0, table[following.clamp(min=0)], scheduler.final_alpha_cumprod.double())
    return timesteps, table[timesteps], after
