"""Latent rewards: a trained reward model scores a sampler's states as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from latentreward.contracts import Conditioning, LatentSpace, NoisyStates, TensorRecord
from latentreward.errors import InputError
from latentreward.noise import NoiseProcess
from latentreward.policies.surrogate_gradient import gradient_carrier
from latentreward.rewards.base import Reward, RewardSource
from latentreward.rewards.conversion import convert_states, describe_conversion
from latentreward.rewards.shared_base import share_adapter, shares_network, shares_text
from latentreward.scoring.layouts.find import StoredReward, find_reward
from latentreward.scoring.layouts.published import PublishedSettings
from latentreward.scoring.network import RewardNetwork

if TYPE_CHECKING:
    from latentreward.policies import Policy

Share = Literal["auto", "never"]


@dataclass(frozen=True)
class EncodedPrompts(TensorRecord):
    """Prompts as a reward model's network takes them.

    Attributes:
        conditioning: One row per prompt.
        uncond: The empty prompt, one row, if the head asks for it.
    """

    conditioning: Conditioning
    uncond: Conditioning | None


class LatentScorer(Reward):
    """A reward model at the states of a policy.

    Gradients go to the latents alone and are computed at once, ``batch_size`` states at a time: no more than one
    batch's activations are ever held, and whatever switches the network of a shared model is undone before the policy
    is back-propagated.

    Args:
        model: Reward model.
        noise_process: Forward process that the states belong to; one other than the model's is converted.
        batch_size: States per pass; None takes all at once.
        policy: The policy, of which ``model`` may have parts, which are not registered here.
        switch: Makes the context in which a shared network reads for this reward.
    """

    differentiable = True

    def __init__(
        self,
        model: RewardNetwork,
        noise_process: NoiseProcess,
        batch_size: int | None = None,
        policy: Policy | None = None,
        switch: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        self._model = (model,)  # a tuple, so that a shared network is not registered twice
        foreign = set() if policy is None else {*policy.children()}
        self._owned = nn.ModuleDict({"head": model.head})
        self._owned.update({name: part for name, part in model.backbone.named_children() if part not in foreign})
        self.noise_process, self.batch_size, self._switch = noise_process, batch_size, switch

    @property
    def model(self) -> RewardNetwork:
        """The reward model, its shared parts included."""
        return self._model[0]

    def train(self, mode: bool = True) -> LatentScorer:
        """Stays in evaluation mode, whatever the module around it does."""
        return super().train(False)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> EncodedPrompts:
        """See :meth:`Reward.encode_prompts`; raw prompts go through the reward's own tokenizer and text encoder."""
        return EncodedPrompts(*self.model.encode_prompts(prompts))

    def score(self, states: NoisyStates, encoded: EncodedPrompts) -> Tensor:
        """See :meth:`Reward.score`."""
        process = self.model.backbone.noise_process
        latents, timesteps = convert_states(states.latents, states.timesteps, self.noise_process, process)

        def read(latents: Tensor, rows: slice) -> Tensor:
            conditioning = encoded.conditioning.select(states.rows[rows])
            return self.model(latents, timesteps[rows], conditioning, encoded.uncond)

        return self._by_rows(latents, read)

    def score_clean(
        self,
        latents: Tensor,
        rows: Tensor,
        encoded: EncodedPrompts,
        noise: Tensor | None = None,
        sigmas: Sequence[float] = (),
    ) -> Tensor:
        """See :meth:`Reward.score_clean`; levels are the nearest of the model's own noise process.

        Raises:
            InputError: If ``noise`` or ``sigmas`` is missing.
        """
        if noise is None or not len(sigmas):
            raise InputError("a latent reward scores finished latents at a noise level; give noise and sigmas")
        process = self.model.backbone.noise_process
        timesteps = process.timesteps_at(torch.tensor([float(sigma) for sigma in sigmas])).to(latents.device)

        def read(latents: Tensor, chunk: slice) -> Tensor:
            conditioning = encoded.conditioning.select(rows[chunk])
            levels = []
            for timestep in timesteps:
                repeated = timestep.repeat(len(latents))
                noisy = process.add_noise(latents, noise[chunk].to(latents), repeated)
                levels.append(self.model.read(noisy, repeated, conditioning, encoded.uncond))
            return self.model.head(levels[0]) if len(levels) == 1 else self.model.head.score_ensemble(levels)

        return self.checked(self._by_rows(latents, read), timesteps[:1].expand(len(latents)))

    def _by_rows(self, latents: Tensor, read: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Scores ``(N,)`` by ``read(latents of some rows, those rows)``, with a gradient to ``latents`` if wanted.

        A row's score depends on that row alone, so the gradient of the sum holds every row's own.
        """
        wanted = torch.is_grad_enabled() and latents.requires_grad
        size = self.batch_size or max(len(latents), 1)
        scores: list[Tensor] = []
        slopes: list[Tensor] = []
        with self._switch(), torch.set_grad_enabled(wanted):
            for start in range(0, len(latents), size):
                rows = slice(start, start + size)
                part = latents[rows].detach().requires_grad_(wanted)
                scored = read(part, rows).float()
                scores.append(scored.detach())
                if wanted:
                    slopes += torch.autograd.grad(scored.sum(), part)
        joined = torch.cat(scores)
        if not wanted or joined.ndim > 1:  # the latter is refused by our caller
            return joined
        return joined + gradient_carrier(latents, torch.cat(slopes))


class LatentReward(RewardSource):
    """A trained LRM, DiNa-LRM or any other reward model of this program, as a reward for alignment.

    Args:
        path: Checkpoint of a reward's training, folder of its run (the newest ``reward*.ckpt``, else ``last*.ckpt``),
            a model folder (``RewardModel.save_pretrained``, ``latentreward publish``) or a published layout,
            ``casiatao/LRM`` or ``liuhuohuo/DiNa-LRM-SD35M-12layers``; the folders also as hub ids.
        config: Settings of the training run; None takes the ``config.yaml`` beside the checkpoint.
        base: Pipeline of the frozen weights, if not the one that the model names; LRM's layout names none.
        share: ``auto`` runs the reward on the policy's network where it is an adapter on the very same weights;
            ``never`` gives it its own.
        average: Whether the moving average of ``TrainableEMA`` stands for the weights, if the checkpoint has one.
        batch_size: States per pass, which bounds memory; None takes all at once.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether the model's settings may name classes that are not registered, which are imported.
        published: Settings that the files of a published layout do not hold, such as ``guidance: 1``.

    Example:
        .. code-block:: yaml

            model:
              init_args:
                reward: {class_path: LatentReward, init_args: {path: runs/lrm/reward.ckpt}}
    """

    def __init__(
        self,
        path: str,
        config: str | None = None,
        base: str | None = None,
        share: Share = "auto",
        average: bool = True,
        batch_size: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        published: PublishedSettings | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise InputError(f"reward.batch_size={batch_size} must be at least 1")
        self.path, self.share, self.batch_size = path, share, batch_size
        trust = {"trusted": trust_remote_code, "published": published}
        self._find = partial(find_reward, path, config, base, average, revision=revision, **trust)
        self._stored: StoredReward | None = None

    @property
    def stored(self) -> StoredReward:
        """What lies at ``path``; looked up at the first use."""
        if self._stored is None:
            self._stored = self._find()
        return self._stored

    def latent_space(self) -> LatentSpace:
        """See :meth:`RewardSource.latent_space`."""
        return self.stored.latent_space()

    def load(self, policy: Policy) -> LatentScorer:
        """See :meth:`RewardSource.load`."""
        stored, self._stored = self.stored, None  # what it has read is not kept
        with torch.random.fork_rng(devices=[]):  # initial values that are overwritten
            loaded = self._loaded(stored, policy)
        if conversion := describe_conversion(policy.noise_process, loaded.model.backbone.noise_process):
            from lightning.pytorch.utilities import rank_zero_info  # takes seconds to import

            rank_zero_info(f"reward {self.path}: {conversion}")
        return loaded

    def _loaded(self, stored: StoredReward, policy: Policy) -> LatentScorer:
        network, text = (self.share == "auto" and shares(stored, policy) for shares in (shares_network, shares_text))
        if not network:
            model = stored.load()
            model.backbone.vae = None  # 84 million parameters that no latent needs
            if text:
                model.backbone.text_encoder = policy.text_encoder
            return LatentScorer(model, policy.noise_process, self.batch_size, policy)
        outline = stored.on_meta_device
        adapter = share_adapter(policy, outline.get_submodule(outline.network_name), stored.adapter())
        encoder, head = policy.text_encoder, None
        if text:
            head = stored.head()
        else:  # its text encoder comes with a network of its own, which is let go
            whole = stored.load()
            encoder, head = whole.backbone.text_encoder, whole.head
        model = RewardNetwork(outline.with_network(policy.network, encoder), head)
        return LatentScorer(model, policy.noise_process, self.batch_size, policy, partial(policy.adapters.use, adapter))
