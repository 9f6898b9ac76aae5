"""SPO's step-aware preference model (arXiv:2406.04314): a pixel scorer of a generator's predictions at a timestep."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentreward.alignment.policies.loading import PolicySource
from latentreward.core.contracts import CrossScores, PairScores, PathText, PreferenceBatch
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.diffusion import LevelSampler, TimestepGrid
from latentreward.reward import LRMLoss, PreferenceLoss, gather_with_grad
from latentreward.reward.modules.reward import EncodedPairs, PairDraws, RewardModule, latents_of
from latentreward.reward.scorers.clip import PICKSCORE
from latentreward.reward.scorers.step_aware import load_step_aware

if TYPE_CHECKING:
    from latentreward.diffusion.encoders.vae import LatentEncoder


class StepAwarePixelModule(RewardModule):
    """Module that trains SPO's scorer on a generator's predictions of noised images.

    The generator predicts the clean latents, the VAE decodes them, and the scorer compares the two decoded images. All
    weights of the scorer train, none of the generator. The checkpoint serves as ``weights`` of a
    :class:`~latentreward.reward.StepAwareScorer` with the same ``source``.

    Args:
        generator: Generator that predicts the clean latents; its adapter stays switched off.
        source: Folder or hub id of the CLIP model to start from, or ``spm_tiny`` or ``held_out_tiny``.
        processor: Folder or hub id of the tokenizer and preprocessing; None takes OpenCLIP's ViT-H for PickScore,
            otherwise ``source``.
        revision: Branch, tag or commit of a hub id; pin it.
        guidance_scale: Guidance of the prediction; None takes the generator family's own, 5 for SD and SD3.
        decode_batch_size: Number of latents that the VAE decodes at once.
        gradient_checkpointing: Recompute the scorer's vision blocks in the backward pass.
        loss: Preference loss; None takes ``LRMLoss(mode="pair")``, SPO's loss. SPO's loss with in-batch
            negatives is ``mode="batch"``.
        levels: Sampler of a training pair's timestep; None samples uniformly from 0, 1, …, 999.
        eval_timesteps: See :class:`~latentreward.reward.RewardModule`.

    Note:
        The released validation scores the images themselves at timestep 0; here images pass VAE and generator at
        timestep 0 too. For SDXL the released labels are PickScore's, not the data set's: score the pairs with PickScore
        first, and train on these labels.
    """

    def __init__(
        self,
        generator: PolicySource,
        source: PathText = PICKSCORE,
        processor: PathText | None = None,
        revision: str | None = None,
        guidance_scale: float | None = None,
        decode_batch_size: int = 8,
        gradient_checkpointing: bool = False,
        loss: PreferenceLoss | None = None,
        levels: LevelSampler | None = None,
        eval_timesteps: Sequence[float] = (0, 251, 501, 701, 951),
        **options: Any,
    ) -> None:
        check_at_least_one(decode_batch_size=decode_batch_size)
        checked = generator.resolve_family().guidance(guidance_scale)
        policy = generator.load()
        super().__init__(
            policy,  # type: ignore[arg-type]  # it has a backbone's encoders and noise process
            None,  # type: ignore[arg-type]  # the scorer reads pictures, not features
            loss=loss or LRMLoss(),
            levels=levels or TimestepGrid(0, 999, 1),
            eval_timesteps=eval_timesteps,
            ensemble_sigmas=(),
            **options,
        )
        self.generator = policy.requires_grad_(False).eval()
        network, _ = load_step_aware(source, processor, revision)
        self.network = network.requires_grad_(True).train()
        self.network.gradient_checkpointing = gradient_checkpointing
        self.guidance_scale, self.decode_batch_size = checked, decode_batch_size

    @property
    def latent_decoder(self) -> "LatentEncoder | None":
        return self.generator.vae

    def encode(self, batch: PreferenceBatch, draws: PairDraws, noise_per_image: bool = False) -> EncodedPairs:
        latents = latents_of(self.generator, batch, draws, self.posterior)
        if latents.ndim == 5 and latents.shape[2] > 1:
            raise InputError("the data hold clips, but a reward on pixels scores images; set frames of the data to 1")
        conditioning, uncond = self.generator.conditioning_of(batch), batch.uncond
        if uncond is None and self.generator.family.needs_uncond(self.guidance_scale):
            uncond = self.generator.encode_uncond(batch.prompts)
        noise = draws.normal("noise", latents.shape[1:], noise_per_image).to(latents.device)
        rows = [*range(len(batch))] * 2
        return EncodedPairs(latents, noise, conditioning.select(rows), uncond and uncond.empty_for(rows))

    @torch.no_grad()
    def predict_pixels(self, encoded: EncodedPairs, timesteps: Tensor) -> Tensor:
        """Noise the images to ``timesteps`` ``(2B,)``, predict their clean latents, and decode: ``(2B, 3, H, W)``."""
        noisy = self.add_noise(encoded, timesteps)
        # SPO's scorer judges what the base model predicts, before any alignment.
        with self.generator.reference():
            output = self.generator.predict_guided(
                noisy, timesteps.to(noisy.device), encoded.conditioning, encoded.uncond, self.guidance_scale
            )
        clean = self.noise_process.clean(noisy, output.float(), timesteps)
        # In parts: decoded pictures take far more memory than their latents.
        return torch.cat([self.generator.vae.decode(part) for part in clean.split(self.decode_batch_size)])

    def score(
        self, batch: PreferenceBatch, encoded: EncodedPairs, timesteps: Tensor, with_cross: bool = False
    ) -> PairScores:
        pixels = self.predict_pixels(encoded, timesteps)
        image_embeds = self.network.embed_images(pixels, timesteps.to(pixels.device))
        text_embeds = self.network.embed_tokens(self.network.tokenize(batch.prompts))
        chosen, rejected = self.network.similarity(image_embeds, text_embeds.repeat(2, 1)).chunk(2)
        cross = None
        if with_cross:
            texts = gather_with_grad(text_embeds) * self.network.clip.logit_scale.float().exp()
            cross = CrossScores(*(texts @ gather_with_grad(half).T for half in image_embeds.chunk(2)))
        chosen_sigmas, rejected_sigmas = self.noise_process.sigma(timesteps).to(chosen.device).chunk(2)
        pairs = batch.label, batch.weight, chosen_sigmas, rejected_sigmas
        return PairScores(chosen, rejected, *pairs, cross, batch.targets)
