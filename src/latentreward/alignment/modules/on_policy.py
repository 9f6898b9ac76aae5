r"""On-policy distillation: a policy's outputs at states of its own samples are pulled to those of frozen teachers.

.. math:: l = f(\sigma)\,\frac1J \sum_j \langle (v - v_j)^2 \rangle

v is the output of the policy and v_j that of teacher j for one noisy state. The mean μ of a sampler's step is linear in
the output, with the slope c: a flow's is Δ(1 + s²(1 − σ) / 2σ), where Δ is the step in σ and s√Δ the standard deviation
of its noise. So losses of means differ from one of outputs by a factor of the noise level alone.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latentreward.alignment.losses.matching import squared_error
from latentreward.alignment.modules.alignment import AlignmentModule
from latentreward.alignment.policies.checkpoint import SavedAdapter, network_name, read_policy_adapter
from latentreward.alignment.policies.loading import PolicySource
from latentreward.alignment.policies.policy import Policy, add_frozen_adapter
from latentreward.alignment.rewards.shared_base import leave_out
from latentreward.alignment.rollout.samplers import Sampling
from latentreward.alignment.rollout.step_choice import StepChoice
from latentreward.alignment.rollout.trajectories import sample_trajectories
from latentreward.core.checkpoints.base_weights import BaseSample
from latentreward.core.contracts import PathText, PromptBatch, SampledStates, join_rows
from latentreward.core.errors import InputError, check_at_least_one, check_choices, errors_at
from latentreward.core.running import pair_generator
from latentreward.diffusion import Family
from latentreward.diffusion.backbones.loading import set_attention_backend
from latentreward.diffusion.backbones.tuning import plain_name, stored_ranks
from latentreward.diffusion.backbones.weights import settle
from latentreward.reward.losses.base import SetLoss

Factor = Literal["velocity", "mean_match", "kl_exact"]


class OnPolicyLoss(SetLoss):
    """Loss of on-policy distillation.

    Args:
        factor: f as a function of the noise level. ``velocity``: 1, all levels count equally (DanceOPD).
            ``mean_match``: c²/2, half the squared difference of the steps' means (UniRL's default); without noise it
            is Δ²/2, as in DiffusionOPSD's own distillation up to the ½. ``kl_exact``: c²/2s²Δ, the KL divergence of
            the two steps; for a flow it falls with the noise level.

    Note:
        verl-omni and Flow-OPD divide by 2s² where the KL divergence of the steps has 2s²Δ.
    """

    def __init__(self, factor: Factor = "mean_match") -> None:
        super().__init__()
        check_choices(OnPolicyLoss, factor=factor)
        self.factor = factor

    def forward(self, output: Tensor, teachers: Tensor, slope: Tensor, std: Tensor) -> Tensor:
        """Compute the loss ``(B,)``, float64, of outputs ``(B, C, ...)`` against the teachers' ``(J, B, C, ...)``.

        ``slope`` c and ``std`` s√Δ, positive for ``kl_exact``, are ``(B,)``.
        """
        error = torch.stack([squared_error(output, one.detach()) for one in teachers]).mean(dim=0)
        square = slope.to(error).square()
        match self.factor:
            case "mean_match":
                return square / 2 * error
            case "kl_exact":
                return square / (2 * std.to(error).square()) * error
        return error


SHARED_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Parts of a pipeline whose results a teacher gets from the policy; of a network without a flow also its scheduler."""
COMPARED = ("hidden_size", "d_model", "projection_dim", "num_hidden_layers", "num_layers", "vocab_size",
            "prediction_type", "beta_start", "beta_end", "beta_schedule")  # fmt: skip
"""Fields of these parts' configs that must be equal."""


@dataclass
class Teacher:
    """A frozen network that a policy learns from.

    Attributes:
        checkpoint: Checkpoint of an alignment run on the policy's base. Its adapter is added to the policy's network.
        pipeline: Folder or hub id of another pipeline, of the policy's family and with its text encoders; null with
            ``checkpoint``. Without both, the teacher is the policy's base, which is of use with a guidance scale.
        guidance_scale: Guidance scale, as the pipeline takes it; None takes the policy's.
    """

    checkpoint: PathText | None = None
    pipeline: PathText | None = None
    guidance_scale: float | None = None

    def check(self, policy: PolicySource, guidance_scale: float | None) -> None:
        """Raise InputError for a teacher that the policy cannot learn from, before weights are loaded."""
        family = policy.resolve_family()
        if self.checkpoint is not None and self.pipeline is not None:
            raise InputError("teachers: a teacher has checkpoint and pipeline; give one of them, or two teachers")
        with errors_at("teachers: " if self.pipeline is None else f"teachers: pipeline={self.pipeline}: "):
            other = self.family(policy)
            same = self.scale(other, guidance_scale) == guidance_scale
        if same and self.checkpoint is None and self.pipeline is None:
            raise InputError("teachers: this is the policy itself; give checkpoint, pipeline or another guidance_scale")
        if self.pipeline is None:
            return
        if type(other) is not type(family) or other.latent_space != family.latent_space:
            told = f"teachers: pipeline={self.pipeline} is {other.title}, the policy {family.title}"
            raise InputError(f"{told}; give one of the same family and latent space")
        for part in (*SHARED_PARTS, *(() if family.flow else ("scheduler",))):
            pipelines = [one.pipeline for one in (family, other) if one.pipeline.has(part)]
            configs = [one.config(part) for one in pipelines]  # of models that see pictures, their language model's
            found = [[one.get("text_config", one).get(name) for name in COMPARED] for one in configs]
            if len(found) == 2 and found[0] != found[1]:
                raise InputError(f"teachers: pipeline={self.pipeline} has another {part} than the policy")

    def family(self, policy: PolicySource) -> Family:
        """Return the family of the teacher's network."""
        source = policy if self.pipeline is None else replace(policy, source=self.pipeline, revision=None, variant=None)
        return source.resolve_family()

    def scale(self, family: Family, guidance_scale: float | None) -> float | None:
        """Return the guidance scale of a teacher of this ``family`` for a policy's."""
        return guidance_scale if self.guidance_scale is None else family.guidance(self.guidance_scale)

    def saved(self) -> SavedAdapter | None:
        """Read the adapter of ``checkpoint``; only its weights and rank are used, so that no family is imported."""
        return None if self.checkpoint is None else read_policy_adapter(self.checkpoint, trusted=True)


def add_teacher(policy: Policy, saved: SavedAdapter, number: int, checkpoint: PathText | None) -> str:
    """Add the adapter of an alignment run to a policy's network, frozen and left out of its state dict."""
    from peft import LoraConfig

    name = f"teacher{number}"
    if saved.base is not None:
        BaseSample.of(policy, policy.source).check(saved.base)
    weights = {network_name(key): tensor for key, tensor in saved.weights.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    layers = [*stored_ranks(policy.network, shapes, f"teachers: checkpoint={checkpoint}")]
    config = LoraConfig(r=saved.source.lora.rank, lora_alpha=saved.source.lora.alpha, target_modules=layers)
    for key, parameter in add_frozen_adapter(policy.network, config, name).items():
        # As trained, also where frozen weights are stored in bfloat16.
        parameter.data = weights[plain_name(key)].to(parameter.device, torch.float32)
    policy.adapters.refresh()
    leave_out(policy.network, name)
    return name


def load_teacher(source: PolicySource, family: Family) -> Policy:
    """Load the network of another pipeline's ``family``, frozen, in the storage type of the policy's."""
    network = family.load_network().requires_grad_(False)
    settle(network, getattr(torch, source.frozen_dtype), torch.float32, family.float32_parts)
    if source.attention_backend is not None:
        set_attention_backend(network, source.attention_backend)
    return Policy(network, family).eval()


class OnPolicyDistillationModule(AlignmentModule):
    """On-policy distillation: learn from frozen teachers at the states of one's own samples, without a reward.

    The policy samples; at each state of the sampling, its output is pulled to those of the teachers for the same state
    and prompt (mean over the teachers). For flows and networks that predict noise or v. See
    :class:`~latentreward.alignment.OnPolicyLoss`; logs ``train/loss``.

    Args:
        teachers: At least one :class:`Teacher`.
        sampling: Sampler settings of rollouts; None takes 10 steps without noise.
        steps: Choice of the sampler's steps whose states are learned from, for each sample; None takes all.
        prompts_at_once: Prompts of a rollout that are sampled at once, to bound memory. None takes all.
        guidance_scale: Guidance scale of the policy, in sampling and training; None switches guidance off.
    """

    experience = SampledStates

    def __init__(
        self,
        policy: PolicySource,
        teachers: list[Teacher],
        sampling: Sampling | None = None,
        steps: StepChoice | None = None,
        loss: OnPolicyLoss | None = None,
        prompts_at_once: int | None = None,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> None:
        if not teachers:
            raise InputError("teachers is empty; give at least one")
        check_at_least_one(prompts_at_once=prompts_at_once)
        family, sampling, loss = policy.resolve_family(), sampling or Sampling(10), loss or OnPolicyLoss()
        guidance_scale = family.guidance(family.unguided if guidance_scale is None else guidance_scale)
        sampler = sampling.sampler(family)
        if loss.factor == "kl_exact":
            sampler.require_noise()
        if steps is not None:
            steps.choose(len(sampler), torch.Generator())
        for teacher in teachers:
            teacher.check(policy, guidance_scale)
        adapters = [teacher.saved() for teacher in teachers]
        super().__init__(policy, None, guidance_scale=guidance_scale, **options)
        self.sampling, self.sampler, self.steps, self.loss = sampling, sampler, steps, loss
        self.prompts_at_once = prompts_at_once
        families = [teacher.family(policy) for teacher in teachers]
        self.scales = [one.scale(own, guidance_scale) for one, own in zip(teachers, families, strict=True)]
        scales = zip((family, *families), (guidance_scale, *self.scales), strict=True)
        self.guided = any(own.needs_uncond(scale) for own, scale in scales)
        self.adapters = [
            None if saved is None else add_teacher(self.policy, saved, number, teacher.checkpoint)
            for number, (teacher, saved) in enumerate(zip(teachers, adapters, strict=True))
        ]
        others = {str(number): families[number] for number, one in enumerate(teachers) if one.pipeline is not None}
        self.networks = nn.ModuleDict({number: load_teacher(policy, family) for number, family in others.items()})

    def make_experience(self, prompts: PromptBatch) -> SampledStates:
        rows = []
        for part in prompts.split(self.prompts_at_once):
            settings = (part, self.sampling, self.guidance_scale, self.seed)
            found = sample_trajectories(self.policy, self.sampler, *settings)
            for number, key in enumerate(part.keys):
                chosen = self.chosen(key)
                keys = tuple(f"{key}/{index}" for index in chosen.tolist())
                states = found.latents[chosen.to(found.latents.device), number].cpu()
                rows.append(SampledStates(keys, (part.prompts[number],) * len(keys), states, found.timesteps[chosen]))
        return join_rows(rows)

    def chosen(self, key: str) -> Tensor:
        """Return the indices of the steps whose states the sample ``key`` is learned from, int64."""
        every = torch.arange(len(self.sampler))
        if self.steps is not None:
            every = self.steps.choose(len(self.sampler), pair_generator(self.seed, "trained steps", 0, key))
        # A step without noise, such as DDIM's last, has no density.
        return every if self.loss.factor != "kl_exact" else every[self.sampler.noise_std[every] > 0]

    @torch.no_grad()
    def corrections(self, batch: SampledStates) -> Tensor:
        """Return the outputs ``(J, B, C, ...)`` of the teachers for the states of a batch."""
        encoded, outputs = self.conditioning(batch.prompts), []
        networks = dict(self.networks.items())
        for number, (adapter, scale) in enumerate(zip(self.adapters, self.scales, strict=True)):
            network: Any = networks.get(str(number), self.policy)
            with network.adapters.use(adapter):
                outputs.append(network.predict_guided(batch.latents, batch.timesteps, *encoded, scale))
        return torch.stack(outputs)

    def training_step(self, batch: SampledStates, batch_idx: int) -> Tensor:
        zeros = batch.latents.new_zeros(len(batch), *[1] * (batch.latents.ndim - 1))
        # Means are linear in the output.
        step = self.sampler.transition(zeros, zeros + 1, batch.timesteps)
        rows = self.loss(self.prediction(batch), self.corrections(batch), step.mean.flatten(), step.std)
        loss = rows.mean().float()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss
