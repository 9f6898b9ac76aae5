"""Train the two small pixel scorers of the tiny world: ``python -m tools.pretraining.pixel_scorers``.

``spm_tiny`` is SPO's step-aware preference model: it scores the clean pictures that ``sd_tiny`` predicts at a timestep.
``held_out_tiny`` is a plain CLIP scorer of finished pictures, trained on other pairs, as a second reward that shows
when a policy exploits its own reward. Both are first trained with CLIP's loss on drawn pictures and captions, then on
preference pairs with noisy labels. The oracle is used for evaluation only.

``--world emoji`` trains the first part alone, ``clip``, from which SPO's scorer of that world starts.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from latentreward.core.storage.progress import Progress
from latentreward.reward.scorers.step_aware import STEP_FILE, StepAwareCLIP
from latentreward.tinyworld.pairs import Pair, draw_pairs, generate_pairs
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline
from tools.pretraining.networks import token_settings
from tools.pretraining.pipelines import WORLDS, open_world
from tools.pretraining.tokenizer import build_tokenizer, tokenize
from tools.pretraining.training import TrainingRecipe, readme, train_averaged
from tools.pretraining.vae import draw_training_pictures, normalize_pictures
from tools.pretraining.worlds import CLEAR_GAP, TrainingWorld

EVALUATION_TIMESTEPS = (1, 251, 501, 801)
EVALUATION_SEED = 1000
SCORERS = PIPELINE_FOLDERS["sd_tiny"].parents[1] / "scorers"
"""Folder of the shipped scorers."""


@dataclass(frozen=True)
class Recipe(TrainingRecipe):
    """Training settings of the shipped scorers."""

    seed: int = 0  # of pictures, pairs, initial weights, batches and noise
    pictures: int = 24_000  # pictures with captions for CLIP's loss
    caption_steps: int = 500  # updates with CLIP's loss
    caption_batch: int = 128  # pictures per update with CLIP's loss
    pairs: int = 12_000  # preference pairs, ties included
    pair_steps: int = 800  # updates on preference pairs
    pair_batch: int = 64  # pairs per update
    lr: float = 1e-3  # peak learning rate
    # Share of training pairs whose pictures are replaced by predictions from noisy latents; at 0 the scorer takes no
    # timesteps.
    predicted_share: float = 0.75
    guidance_scales: tuple[float, ...] = (1.0, 3.0)  # of the predictions, used in turn


RECIPES = {"spm_tiny": Recipe(seed=100), "held_out_tiny": Recipe(seed=200, predicted_share=0.0)}


@dataclass(frozen=True)
class PairTable:
    """Preference pairs as tensors."""

    pictures: Tensor  # ``(N, 2, 3, 32, 32)`` uint8
    tokens: Tensor  # ``(N, 16)`` token IDs of the captions
    label: Tensor  # ``(N,)`` probability that the first picture is preferred
    gap: Tensor  # ``(N,)`` utility of the first picture minus utility of the second; for evaluation only

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> PairTable:
        """Decode the pictures and tokenise the captions of pairs."""
        sides = [[Image.open(io.BytesIO(side.jpeg)) for side in (pair.first, pair.second)] for pair in pairs]
        pictures = [[np.asarray(image.convert("RGB")) for image in both] for both in sides]
        return cls(
            torch.from_numpy(np.array(pictures)).permute(0, 1, 4, 2, 3).contiguous(),
            tokenize([pair.caption for pair in pairs]),
            torch.tensor([pair.label for pair in pairs]),
            torch.tensor([pair.first.utility - pair.second.utility for pair in pairs]),
        )


def build_scorer(words: tuple[str, ...] | None = None) -> StepAwareCLIP:
    """Build the untrained CLIP scorer with the shipped config: about a million parameters, patches of 8 × 8 pixels.

    ``words`` are those of the tokenizer; the shipped one's if None.
    """
    from transformers import CLIPConfig, CLIPModel

    config, tokenizer = CLIPConfig.from_pretrained(SCORERS / "spm_tiny"), build_tokenizer(words)
    config.text_config.update(token_settings(tokenizer))
    return StepAwareCLIP(CLIPModel(config), tokenizer, mean=(0.5,) * 3, std=(0.5,) * 3)


def caption_losses(scorer: StepAwareCLIP, recipe: Recipe, world: TrainingWorld) -> Iterator[Tensor]:
    """Yield CLIP's loss (arXiv:2103.00020) on random batches of drawn pictures, endlessly."""
    rng = np.random.default_rng([recipe.seed, 0])
    pictures, captions = draw_training_pictures(recipe.pictures, rng, world.pretraining, 0.6, world)
    tokens, number = tokenize(captions, world.words), recipe.caption_batch
    while True:
        rows = rng.integers(len(pictures), size=number)
        images = scorer.embed_images(normalize_pictures(pictures[rows]), torch.zeros(number))
        texts = scorer.embed_tokens(tokens[rows])
        logits = scorer.clip.logit_scale.exp() * texts @ images.T
        same = (tokens[rows][:, None] == tokens[rows]).all(dim=-1).float()
        target = same / same.sum(dim=1, keepdim=True)
        yield (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def pair_losses(scorer: StepAwareCLIP, recipe: Recipe, pairs: PairTable) -> Iterator[Tensor]:
    """Yield the cross-entropy of the preferences on random batches of pairs, endlessly."""
    rng = np.random.default_rng([recipe.seed, 1])
    predicted, timesteps = None, torch.zeros(len(pairs.label))
    if recipe.predicted_share:
        predicted, timesteps = predict_pictures(pairs, recipe)
    while True:
        rows = rng.integers(len(pairs.label), size=recipe.pair_batch)
        pixels = normalize_pictures(pairs.pictures[rows])
        noisy = torch.from_numpy(rng.random(len(rows)) < recipe.predicted_share)
        if predicted is not None:
            pixels = torch.where(noisy[:, None, None, None, None], predicted[rows], pixels)
        margin = score_margin(scorer, pixels, torch.where(noisy, timesteps[rows], 0.0), pairs.tokens[rows])
        yield binary_cross_entropy_with_logits(margin, pairs.label[rows])


def score_margin(scorer: StepAwareCLIP, pixels: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
    """Compute the first picture's score minus the second's, ``(B,)``, for pairs of pictures ``(B, 2, 3, 32, 32)``."""
    images = scorer.embed_images(pixels.flatten(0, 1), timesteps.repeat_interleave(2))
    texts = scorer.embed_tokens(tokens).repeat_interleave(2, dim=0)
    first, second = scorer.similarity(images, texts).view(-1, 2).T
    return first - second


@torch.no_grad()
def predict_pictures(pairs: PairTable, recipe: Recipe, timesteps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Predict clean pictures from noised pictures with ``sd_tiny``, as in SPO's training of its scorer.

    Both pictures of a pair get equal noise. ``timesteps`` ``(N,)``, one per pair, are drawn uniformly from 0 to 999 if
    None.

    Returns:
        Decoded predictions ``(N, 2, 3, 32, 32)`` and timesteps ``(N,)``.
    """
    pipeline = load_pipeline(PIPELINE_FOLDERS["sd_tiny"])
    generator = torch.Generator().manual_seed(recipe.seed)
    if timesteps is None:
        timesteps = torch.randint(0, 1000, (len(pairs.label),), generator=generator)
    empty = pipeline.text_encoder(tokenize([""]))[0]
    batches = torch.arange(len(timesteps)).split(128)
    progress, parts = Progress("predictions", len(batches), "batches"), []
    for place, rows in enumerate(batches):
        pixels = normalize_pictures(pairs.pictures[rows].flatten(0, 1))
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        at = timesteps[rows].repeat_interleave(2)
        noise = torch.randn(len(rows), *latents.shape[1:], generator=generator).repeat_interleave(2, dim=0)
        noisy = pipeline.scheduler.add_noise(latents, noise, at)
        prompts = pipeline.text_encoder(pairs.tokens[rows])[0].repeat_interleave(2, dim=0)
        noise_pred = pipeline.unet(noisy, at, prompts).sample
        guidance = recipe.guidance_scales[place % len(recipe.guidance_scales)]
        if guidance != 1.0:
            without = pipeline.unet(noisy, at, empty.expand_as(prompts)).sample
            noise_pred = without + guidance * (noise_pred - without)
        alpha_bar = pipeline.scheduler.alphas_cumprod[at][:, None, None, None]
        clean = (noisy - (1 - alpha_bar).sqrt() * noise_pred) / alpha_bar.sqrt()
        decoded = pipeline.vae.decode(clean / pipeline.vae.config.scaling_factor).sample
        parts.append(decoded.unflatten(0, (-1, 2)))
        progress.add()
    return torch.cat(parts), timesteps


def fit(scorer: StepAwareCLIP, losses: Iterator[Tensor], steps: int, lr: float, name: str) -> None:
    """Train the scorer with AdamW, warm-up and linear decay, and set its averaged weights at the end."""
    warmup = max(1, min(100, steps // 10))
    train_averaged(scorer, losses, steps=steps, lr=lr, name=name, warmup=warmup, decay=0.99, weight_decay=0.05)


@torch.no_grad()
def accuracy(scorer: StepAwareCLIP, pairs: PairTable, pixels: Tensor, timesteps: Tensor) -> float:
    """Compute the share of pairs with a clear utility gap that the scorer orders like the oracle."""
    margins = [
        score_margin(scorer, *part)
        for part in zip(pixels.split(256), timesteps.float().split(256), pairs.tokens.split(256), strict=True)
    ]
    clear = pairs.gap.abs() > CLEAR_GAP
    return float((torch.cat(margins).sign() == pairs.gap.sign())[clear].float().mean())


def measure(scorer: StepAwareCLIP, recipe: Recipe, drawn: PairTable, generated: PairTable) -> dict[str, float]:
    """Compute the accuracy on held-out drawn pairs, on generated pairs, and on predictions at several timesteps."""
    zeros = torch.zeros(len(drawn.label))
    figures = {"drawn": accuracy(scorer, drawn, normalize_pictures(drawn.pictures), zeros)}
    made = normalize_pictures(generated.pictures)
    figures["generated"] = accuracy(scorer, generated, made, torch.zeros(len(generated.label)))
    for timestep in EVALUATION_TIMESTEPS if recipe.predicted_share else ():
        pixels, timesteps = predict_pictures(drawn, recipe, torch.full_like(zeros, timestep).long())
        figures[f"t{timestep}"] = accuracy(scorer, drawn, pixels, timesteps)
    return figures


def train_on_captions(name: str, recipe: Recipe, world: TrainingWorld) -> StepAwareCLIP:
    """Train the scorer ``name`` with CLIP's loss alone."""
    torch.manual_seed(recipe.seed)
    scorer = build_scorer(world.words)
    if not recipe.predicted_share:  # the timestep is always 0, which does not change the score
        scorer.requires_grad_(False).clip.requires_grad_(True)
    fit(scorer, caption_losses(scorer, recipe, world), recipe.caption_steps, recipe.lr, f"{name} captions")
    return scorer


def train_scorer(name: str, recipe: Recipe) -> StepAwareCLIP:
    """Train the scorer ``name`` with the settings ``recipe``."""
    scorer = train_on_captions(name, recipe, TrainingWorld())
    pairs = PairTable.of(draw_pairs("train", recipe.pairs, np.random.default_rng([recipe.seed, 2])))
    fit(scorer, pair_losses(scorer, recipe, pairs), recipe.pair_steps, recipe.lr, f"{name} pairs")
    return scorer.eval()


def save_weights(scorer: StepAwareCLIP, folder: Path, recipe: Recipe) -> None:
    """Save a scorer in float16; without timesteps, the folder is a plain CLIP folder."""
    shutil.rmtree(folder, ignore_errors=True)
    scorer.half().save(folder)
    for path in folder.iterdir():  # safetensors makes files readable by their owner alone
        path.chmod(0o644)
    scorer.float()
    if not recipe.predicted_share:
        (folder / STEP_FILE).unlink()


def main(args: Sequence[str] | None = None) -> None:
    """Run the command with ``args``; None takes the arguments of the process."""
    command = "python -m tools.pretraining.pixel_scorers"
    parser = argparse.ArgumentParser(prog=command, description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for spm_tiny/ and held_out_tiny/")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on steps, pictures, pairs (quick trials)")
    parser.add_argument("--world", choices=WORLDS, default="shapes", help="of another world: train only clip/")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    if options.world != "shapes":
        world = open_world(options.world, parser)
        recipe = RECIPES["held_out_tiny"].scaled(options.scale)
        save_weights(train_on_captions("clip", recipe, world).eval(), options.output / "clip", recipe)
        return
    rng = np.random.default_rng([EVALUATION_SEED, 0])
    drawn = PairTable.of(draw_pairs("validation", max(16, round(1500 * options.scale)), rng))
    number = max(16, round(600 * options.scale))
    prompts = min(32, number // 2)  # a caption gives about four pairs, so that a quick trial needs few
    generated = PairTable.of(generate_pairs(number, EVALUATION_SEED, prompts_per_round=prompts))
    for name, whole in RECIPES.items():
        recipe, folder = whole.scaled(options.scale), options.output / name
        start = time.process_time()
        scorer = train_scorer(name, recipe)
        seconds = round(time.process_time() - start)
        figures = measure(scorer, recipe, drawn, generated)
        save_weights(scorer, folder, recipe)
        content = {"recipe": asdict(recipe), "figures": figures | {"cpu_seconds": seconds}}
        (folder / "recipe.json").write_text(json.dumps(content, indent=1) + "\n")
        shown = ", ".join(f"{figure} {value:.3f}" for figure, value in figures.items())
        (folder / "README.md").write_text(readme(name, gap=CLEAR_GAP, figures=shown))
        print(f"{name}: {json.dumps(content['figures'])}", flush=True)


if __name__ == "__main__":
    main()
