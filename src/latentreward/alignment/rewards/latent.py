"""Latent rewards: a trained reward model scores noisy sampling states without decoding them."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from latentreward.alignment.rewards.base import Reward, RewardSource, check_edits
from latentreward.alignment.rewards.shared_base import share_adapter, shares_network, shares_text
from latentreward.core.contracts import Conditioning, LatentSpace, NoisyStates, PathText, TensorRecord, check_sources
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.diffusion import DDPM, FlowMatching, NoiseProcess
from latentreward.diffusion.backbones.loading import PipelineSource
from latentreward.diffusion.backbones.weights import Reading, read_weights, reading_later
from latentreward.diffusion.noise.processes import per_sample
from latentreward.reward import ModelSource
from latentreward.reward.scoring.find import find_reward
from latentreward.reward.scoring.reward_model import RewardModel

if TYPE_CHECKING:
    from latentreward.alignment.policies.loading import PolicySource
    from latentreward.alignment.policies.policy import Policy
    from latentreward.diffusion.encoders.prompts import PromptEncoder
    from latentreward.reward.scoring.stored import StoredReward


def surrogate(latents: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute the mean of ``score(latents)``, with the backward pass through ``score`` already done.

    Gradient checkpointing computes blocks again in the backward pass, with the adapter that is active at that time.
    Therefore this function back-propagates through the reward itself; call it under ``policy.adapters.use("reward")``.
    The scalar float32 that it returns carries d mean / d latents into the graph of ``latents`` ``(N, C, ...)``.
    Call ``backward`` on it later, when the policy's adapter is active again.
    """
    leaf = latents.detach().requires_grad_()
    with torch.enable_grad():
        mean = score(leaf).float().mean()
    # To the latents alone: weights of the reward, which may be the policy's network, get no gradient.
    (slope,) = torch.autograd.grad(mean, leaf)
    return mean.detach() + gradient_carrier(latents, slope).sum()


def gradient_carrier(latents: Tensor, slope: Tensor) -> Tensor:
    """Return zeros ``(N,)`` float32 with derivative ``slope`` with respect to ``latents``, both ``(N, C, ...)``."""
    return ((latents - latents.detach()).float() * slope.float()).flatten(1).sum(dim=1)


def same_levels(first: NoiseProcess, second: NoiseProcess) -> bool:
    """Tell whether two processes have the same table of timesteps and sigmas, so that states need no conversion."""
    return type(first) is type(second) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in ((first.timesteps, second.timesteps), (first.sigmas, second.sigmas))
    )


def signal_and_noise(process: NoiseProcess, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors a and s of ``x_t = a·x_0 + s·ε`` at ``timesteps`` ``(N,)``, float32.

    For flow matching the timesteps may lie between those of the process' table; for DDPM they must be in the table.
    """
    if isinstance(process, FlowMatching):
        sigma = timesteps.float() * (process.sigmas[0] / process.timesteps[0]).item()
        return 1.0 - sigma, sigma
    if isinstance(process, DDPM):
        sigma = process.sigma(timesteps)
        return (1.0 - sigma**2).sqrt(), sigma
    raise InputError(f"states of a {type(process).__name__} cannot be converted; use a reward of the policy's process")


def convert_states(
    latents: Tensor, timesteps: Tensor, source: NoiseProcess, target: NoiseProcess
) -> tuple[Tensor, Tensor]:
    """Rescale states of ``source`` to states of ``target`` with the same signal-to-noise ratio, as far as they differ.

    Flow matching has a + s = 1, variance-preserving diffusion a² + s² = 1. A diffusion state x becomes the
    flow-matching state ``x / (√ᾱ + √(1 − ᾱ))`` at ``σ = √(1 − ᾱ) / (√ᾱ + √(1 − ᾱ))``. A flow-matching state x becomes
    the diffusion state ``x / √((1 − σ)² + σ²)`` at ``√(1 − ᾱ) = σ / √((1 − σ)² + σ²)``. The result is the state that
    ``target`` makes of the same clean latents and noise, except that its timestep is rounded to the table of
    ``target``. States ``(N, C, ...)``, which keep their graph, are at ``timesteps`` ``(N,)`` of ``source``.
    """
    if same_levels(source, target):
        return latents, timesteps
    signal, noise = signal_and_noise(source, timesteps)
    norm = signal + noise if isinstance(target, FlowMatching) else (signal**2 + noise**2).sqrt()
    nearest = target.timesteps_at(noise / norm).to(timesteps.device)
    return latents / per_sample(norm, latents).to(latents.dtype), nearest


Share = Literal["auto", "never"]
Switch = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class EncodedPrompts(TensorRecord):
    """Prompts encoded for the network of a reward model."""

    conditioning: Conditioning  # Embeddings of the prompts, one row each
    # Embeddings of the empty prompt, one row, or one for each prompt; None if the head does not need them
    uncond: Conditioning | None

    def select(self, rows: Tensor) -> tuple[Conditioning, Conditioning | None]:
        """Return the prompts at ``rows`` ``(N,)``, and the empty prompt for them."""
        return self.conditioning.select(rows), self.uncond and self.uncond.empty_for(rows)


class LatentScorer(Reward):
    """A loaded :class:`LatentReward`: a reward model that scores states of a policy.

    Gradients flow to the latents only. They are computed during scoring, ``batch_size`` states at a time, for two
    reasons: the activations of only one batch are held in memory, and a network shared with the policy has the reward's
    adapter active during the reward's backward pass and the policy's adapter during the policy's.

    States are those of ``noise_process``, and converted if the model's differs. ``switch`` gives the context in which a
    network that is shared with the ``policy`` has the reward's adapter active. Weights that are ``unread``, by id, are
    mapped and of the files' types until :meth:`set_precision`, :meth:`read_weights` or the first use of :attr:`model`.
    """

    differentiable = True

    origin = "reward"  # name in messages

    def __init__(
        self,
        model: RewardModel,
        noise_process: NoiseProcess,
        batch_size: int | None = None,
        policy: Policy | None = None,
        switch: Switch = nullcontext,
        unread: Mapping[int, Reading] | None = None,
    ) -> None:
        super().__init__()
        kept = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._unread = [reading for key, reading in (unread or {}).items() if key in kept]
        self._model = (model,)  # a tuple, so that a shared network is not registered twice
        foreign = set() if policy is None else {*policy.children()}
        self._owned = nn.ModuleDict({"head": model.head})
        self._owned.update({name: part for name, part in model.backbone.named_children() if part not in foreign})
        self.noise_process, self.batch_size, self._switch = noise_process, batch_size, switch
        self._own_text = self._own_network = False  # whether these have a precision of their own

    @property
    def model(self) -> RewardModel:
        """Reward model, including modules shared with the policy."""
        self.read_weights()
        return self._model[0]

    @cached_property
    def _same_levels(self) -> bool:
        """Whether policy and model share a table of noise levels: compared once, since a rollout scores every step."""
        return same_levels(self.noise_process, self._model[0].backbone.noise_process)

    def read_weights(self, halved: Container[int] = ()) -> None:
        """Read the weights that are still unread, those with ids in ``halved`` as bfloat16."""
        if self._unread:
            read_weights(
                reading._replace(wanted=torch.bfloat16) if id(reading.tensor) in halved else reading
                for reading in self._unread
            )
            self._unread = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LatentScorer:
        """Read the weights before they are moved or converted."""
        self.read_weights()
        return super()._apply(fn, recurse)

    def set_precision(self, dtype: torch.dtype) -> None:
        """See :meth:`Reward.set_precision`; modules shared with the policy keep theirs, and the trainer's autocast."""
        model = self._model[0]
        shared = {name for name, _ in model.backbone.named_children()} - {*self._owned}
        if dtype == torch.bfloat16:
            self.read_weights(model.halved_weights(shared))
        self.model.set_precision(dtype, shared)
        self._own_text, self._own_network = "text_encoder" not in shared, shared <= {"text_encoder"}

    def _autocast(self, own: bool) -> AbstractContextManager[Any]:
        """Return a context that switches autocast off for a part with a precision of its own."""
        return torch.autocast(self.model.device.type, enabled=False) if own else nullcontext()

    def set_text_encoder(self, encoder: PromptEncoder) -> None:
        """Replace the text encoder, such as by embeddings that are stored."""
        self.model.backbone.text_encoder = encoder
        if "text_encoder" in self._owned:
            self._owned["text_encoder"] = encoder

    def check_prompts(self, prompts: Sequence[str]) -> None:
        check_sources(self.origin, prompts, self._model[0].backbone.sources)  # without reading weights

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Encode ``prompts`` by the text encoder alone, in the precision of the run."""
        encoder = self.model.backbone.text_encoder
        assert encoder is not None
        with self._autocast(self._own_text):
            encoded: Conditioning = encoder(prompts)
        return encoded

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> EncodedPrompts:
        self.check_prompts(prompts)
        with self._autocast(self._own_text):
            encoded = EncodedPrompts(*self.model.encode_prompts(prompts))
        return encoded.to(torch.float32) if self._own_network else encoded  # a shared text encoder's may be bfloat16

    def score(self, states: NoisyStates, encoded: EncodedPrompts) -> Tensor:
        latents, timesteps = states.latents, states.timesteps
        if not self._same_levels:
            process = self.model.backbone.noise_process
            latents, timesteps = convert_states(latents, timesteps, self.noise_process, process)

        def read(latents: Tensor, rows: slice) -> Tensor:
            return self.model(latents, timesteps[rows], *encoded.select(states.rows[rows]))

        return self._by_rows(latents, read)

    def score_clean(
        self,
        latents: Tensor,
        rows: Tensor,
        encoded: EncodedPrompts,
        noise: Tensor | None = None,
        sigmas: Sequence[float] = (),
    ) -> Tensor:
        if noise is None or not len(sigmas):
            raise InputError("a latent reward scores finished latents at a noise level; give noise and sigmas")
        process = self.model.backbone.noise_process
        timesteps = process.timesteps_at(torch.tensor([float(sigma) for sigma in sigmas])).to(latents.device)

        def read(latents: Tensor, chunk: slice) -> Tensor:
            prompts, levels = encoded.select(rows[chunk]), []
            for timestep in timesteps:
                repeated = timestep.repeat(len(latents))
                noisy = process.add_noise(latents, noise[chunk].to(latents), repeated)
                levels.append(self.model.backbone(noisy, repeated, *prompts))
            head = self.model.head
            return head.total(head(levels[0]) if len(levels) == 1 else head.score_ensemble(levels))

        return self.checked(self._by_rows(latents, read), timesteps[:1].expand(len(latents)), latents)

    def _by_rows(self, latents: Tensor, read: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Score ``latents`` in batches by ``read``, which gets some rows and their slice, with a gradient if required.

        The score of a row depends on that row alone. Therefore the gradient of the sum of all scores holds in each row
        the gradient of this row's score.
        """
        wanted = torch.is_grad_enabled() and latents.requires_grad
        size = self.batch_size or max(len(latents), 1)
        scores: list[Tensor] = []
        slopes: list[Tensor] = []
        with self._switch(), self._autocast(self._own_network), torch.set_grad_enabled(wanted):
            for start in range(0, len(latents), size):
                rows = slice(start, start + size)
                part = latents[rows].detach().requires_grad_(wanted)
                scored = read(part, rows).float()
                scores.append(scored.detach())
                if wanted:
                    slopes += torch.autograd.grad(scored.sum(), part)
        joined = torch.cat(scores)
        if not wanted or joined.ndim > 1:  # several scores per row: the caller's ``checked`` raises InputError
            return joined
        return joined + gradient_carrier(latents, torch.cat(slopes))


class LatentReward(RewardSource):
    """A trained LRM, DiNa-LRM or other reward model of latentreward, as a reward for alignment.

    Args:
        path: Any of: a checkpoint of a reward's training; the folder of a run (takes the newest ``reward*.ckpt``, else
            the newest ``last*.ckpt``, else the newest checkpoint); a model folder (``RewardModel.save_pretrained``,
            ``latentreward publish``); a folder in the published layout of ``casiatao/LRM`` or
            ``liuhuohuo/DiNa-LRM-SD35M-12layers``. Folders may also be given as hub ids.
        share: ``auto`` runs the reward on the policy's network if the reward is an adapter on the same base weights,
            which saves memory; ``never`` loads a second network.
        average: Whether to load the moving average of ``TrainableEMA`` in place of the last weights, if the checkpoint
            has one.
        batch_size: States per forward pass, to bound memory; None takes all at once.
        loading: See :class:`~latentreward.reward.ModelSource`. The layout of ``casiatao/LRM`` names no base;
            its tokenizers are those of the policy by default.

    Example:
        .. code-block:: yaml

            model:
              init_args:
                reward: {class_path: LatentReward, init_args: {path: runs/lrm/reward.ckpt}}
    """

    def __init__(
        self,
        path: PathText,
        share: Share = "auto",
        average: bool = True,
        batch_size: int | None = None,
        **loading: Any,
    ) -> None:
        check_at_least_one("reward.", batch_size=batch_size)
        self.path, self.share, self.average, self.batch_size = path, share, average, batch_size
        self.model_source = ModelSource(path, **loading)

    @cached_property
    def stored(self) -> StoredReward:
        """Description of the model at ``path``, without weights; read at the first use."""
        return find_reward(self.model_source, self.average)

    def latent_space(self) -> LatentSpace:
        return self.stored.latent_space()

    def require_latents_of(self, policy: PolicySource) -> None:
        super().require_latents_of(policy)
        sources = self.stored.sources(self.stored.on_meta_device)
        check_edits(f"reward {self.path}", sources, policy.resolve_family().sources)

    def load(self, policy: Policy) -> LatentScorer:
        stored = self.stored
        del self.stored  # frees what it has read once the reward is loaded
        # Initialising weights, which are overwritten, must not change the RNG.
        with torch.random.fork_rng(devices=[]), reading_later() as unread:
            if isinstance(pipeline := policy.family.pipeline, PipelineSource):  # not of a pipeline in memory
                stored.complete_from(pipeline)
            model, switch = self._loaded(stored, policy)
        model.backbone.sources = stored.sources(model.backbone)
        check_edits(f"reward {self.path}", model.backbone.sources, policy.family.sources)
        model.backbone.source_encoder = policy.source_encoder  # both have one latent space; the policy knows the size
        if not same_levels(policy.noise_process, model.backbone.noise_process):
            from lightning.pytorch.utilities import rank_zero_info  # takes seconds to import

            ours, its = (type(one.noise_process).__name__ for one in (policy, model.backbone))
            told = f"states of the policy's {ours} are rescaled to its {its}, at equal signal-to-noise ratio"
            rank_zero_info(f"reward {self.path}: {told}")
        scorer = LatentScorer(model, policy.noise_process, self.batch_size, policy, switch, unread)
        scorer.origin = f"reward {self.path}"
        return scorer

    def _loaded(self, stored: StoredReward, policy: Policy) -> tuple[RewardModel, Switch]:
        """Load the model, and return it with the context in which a network shared with the policy is the reward's."""
        network, text = (self.share == "auto" and shares(stored, policy) for shares in (shares_network, shares_text))
        if not network:
            model = stored.load(RewardModel)
            model.backbone.vae = None  # 84 million parameters that scoring of latents does not need
            if text:
                model.backbone.text_encoder = policy.text_encoder
            return model, nullcontext
        outline = stored.on_meta_device
        adapter = share_adapter(policy, outline.get_submodule(outline.network_name), stored.adapter(outline))
        if text:
            encoder, head = policy.text_encoder, stored.head(outline).requires_grad_(False).eval()
        else:  # the text encoder can only be loaded with the whole model, whose network is then dropped
            whole = stored.load(RewardModel)
            encoder, head = whole.backbone.text_encoder, whole.head
        model = RewardModel(outline.with_network(policy.network, encoder), head)
        model.image_sizes = stored.image_sizes or model.image_sizes
        return model, partial(policy.adapters.use, adapter)
