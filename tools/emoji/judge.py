"""Emoji for the pretraining of generators, and a judge of their pictures, which names emoji and sees their quality."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from latentreward.core.errors import InputError
from latentreward.core.storage.durable import replacing, write_file
from latentreward.core.storage.json_files import read_config
from latentreward.reward import ImageScorer
from latentreward.tinyworld.judge import COLUMNS
from latentreward.tinyworld.pairs import Sketch
from latentreward.tinyworld.scenes import picture_utility
from tools.emoji.world import ALIGNMENTS, Emoji, EmojiWorld
from tools.pretraining.training import train_averaged
from tools.pretraining.vae import normalize_pictures
from tools.pretraining.worlds import CLEAR_GAP, TrainingWorld

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

DRAWN, JUDGED = 1024, 192
"""Numbers of captions, with repeats, that policies are aligned on and judged on."""


class JudgeNetwork(nn.Module):
    """Network that names one of ``groups`` emoji and one of ``categories``, and estimates the quality."""

    def __init__(self, groups: int, categories: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128), (128, 128)):
            layers += [nn.Conv2d(before, after, 3, 1 if before == 3 else 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 256), nn.SiLU())
        self.sizes = (groups, categories, 1)
        self.heads = nn.Linear(256, sum(self.sizes))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of emoji ``(B, G)`` and categories ``(B, C)``, and qualities ``(B,)``, of pictures in -1..1."""
        group, category, quality = self.heads(self.trunk(pictures)).split(self.sizes, dim=-1)
        return group, category, quality[:, 0]


class EmojiJudge(ImageScorer):
    """A scorer of 32 × 32 pictures of emoji: utility, alignment, all_right and quality, as of pairs.

    The alignment is 1 if the network names the emoji of the prompt, else 0.5 if it names its category. The judge is for
    evaluation: a policy aligned to it could not be judged by it.

    Args:
        path: Folder that :func:`train_judge` wrote.
    """

    def __init__(self, path: str) -> None:
        super().__init__("judge", batch_size=64)
        self.path = Path(path)
        self.figures = read_config(self.path / "judge.json")
        self.captions: dict[str, list[int]] = self.figures.pop("captions")
        self.network = JudgeNetwork(*self.figures["sizes"]).eval()
        self.network.load_state_dict(load_file(self.path / "judge.safetensors"))

    @property
    def columns(self) -> tuple[str, ...]:
        """See :attr:`Scorer.columns`."""
        return COLUMNS

    def identity(self) -> str:
        """See :meth:`Scorer.identity`."""
        return f"{type(self).__name__} {self.figures}"

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """See :meth:`ImageScorer.score`; scores ``(B, 4)``.

        Raises:
            InputError: If a prompt is no caption.
        """
        for prompt in prompts:
            if prompt not in self.captions:
                raise InputError(f"scorer {self.name!r}: the prompt {prompt[:80]!r} is no caption of an emoji")
        pictures = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        group, category, quality = self.network(normalize_pictures(pictures))
        asked = torch.tensor([self.captions[prompt] for prompt in prompts])
        right, near = group.argmax(-1) == asked[:, 0], category.argmax(-1) == asked[:, 1]
        alignment = torch.tensor(ALIGNMENTS)[torch.where(right, 0, torch.where(near, 1, 2))]
        worth = quality.clamp(0, 1)
        utility = torch.as_tensor(picture_utility(alignment, worth))
        return torch.stack([utility, alignment, right.float(), worth], dim=1)


class EmojiTraining(EmojiWorld, TrainingWorld):
    """Emoji to pretrain generators on, with a judge of their pictures."""

    pretraining = "known"
    readme = "emoji"

    def held_out_captions(self, number: int, seed: int) -> list[str]:
        """See :meth:`TrainingWorld.held_out_captions`; those of ``validation``, whose names generators know."""
        rng = np.random.default_rng([seed, 4])
        return [self.draw_caption(rng, "validation").text for _ in range(number)]

    def prepare(self, made: Path, vae: AutoencoderKL, seed: int, pictures: int, steps: int) -> None:
        """Train the judge, and write lists of captions to align policies on and to judge them on."""
        train_judge(self, made / "judge", vae, seed, pictures, steps)
        rng = np.random.default_rng([seed, 5])
        training = dict.fromkeys(self.draw_caption(rng, "train").text for _ in range(DRAWN))
        for name, texts in (("train", training), ("judged", self.held_out_captions(JUDGED, 11))):
            write_file(made / f"{name}.txt", "".join(f"{text}\n" for text in texts))

    def mean_verdict(self, captions: Sequence[str], pictures: np.ndarray, made: Path) -> dict[str, float]:
        """See :meth:`TrainingWorld.mean_verdict`."""
        scores = EmojiJudge(str(made / "judge"))(captions, [*map(Image.fromarray, pictures)])
        return dict(zip(COLUMNS, scores.mean(dim=0).tolist(), strict=True))


def train_judge(world: EmojiWorld, folder: Path, vae: AutoencoderKL, seed: int, number: int, steps: int) -> None:
    """Train a judge on all emoji that generators know, and write it with figures on how well it judges.

    It learns from ``number`` pictures, degraded or not, half of them encoded and decoded, as generated pictures are.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 10])
    known, unknown = ([one for variants in world.splits[name] for one in variants] for name in ("known", "test"))
    groups, categories = (
        [*dict.fromkeys(names)] for names in zip(*((e.group, e.category) for e in known), strict=True)
    )
    places = {group: place for place, group in enumerate(groups)}
    captions = {one.text: [places.get(one.group, -1), categories.index(one.category)] for one in unknown + known}
    network = JudgeNetwork(len(groups), len(categories))
    drawn = [world.draw_caption(rng, "known") for _ in range(number)]
    sketches = [world.sketch(emoji, rng, mutation_shares=(1.0,)) for emoji in drawn]
    asked = torch.tensor([captions[emoji.text] for emoji in drawn])
    quality = torch.tensor([sketch.quality for sketch in sketches])
    pictures = torch.cat([_decoded(vae, sketches[: number // 2]), _drawn(sketches[number // 2 :])])

    def losses() -> Iterator[Tensor]:
        while True:
            rows = rng.integers(number, size=64)
            group, category, found = network(pictures[rows])
            named = cross_entropy(group, asked[rows, 0]) + cross_entropy(category, asked[rows, 1])
            yield named + 4 * mse_loss(found, quality[rows])

    train_averaged(network, losses(), steps=steps, lr=2e-3, name="judge", warmup=100, decay=0.99, weight_decay=0.05)
    with replacing(folder) as fresh:
        fresh.mkdir()
        save_file(network.state_dict(), fresh / "judge.safetensors")
        content = {"sizes": [len(groups), len(categories)], "world": world.settings, "captions": captions}
        (fresh / "judge.json").write_text(json.dumps(content))
    figures = measure(EmojiJudge(str(folder)), world, vae, min(number, 500))
    print(f"judge: {json.dumps(figures)}", flush=True)
    write_file(folder / "figures.json", json.dumps(figures, indent=1))


def measure(judge: EmojiJudge, world: EmojiWorld, vae: AutoencoderKL, number: int) -> dict[str, float]:
    """Measure how well a judge judges new pictures, encoded and decoded, of ``number`` captions.

    Returns:
        ``clean`` and ``degraded``: share of pictures of held-out emoji that generators know which it names; ``pairs``:
        share of pairs of these that it ranks as the oracle, if their utilities differ by more than 0.3. Of emoji that
        nothing knows, ``category``: share whose category it names, and ``quality``: correlation with their quality.
    """
    rng = np.random.default_rng([77, 10])

    def judged(captions: Sequence[Emoji], **shares: Any) -> tuple[np.ndarray, np.ndarray]:
        sketches = [world.sketch(caption, rng, **shares) for caption in captions]
        pixels = ((_decoded(vae, sketches) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        truth = [(picture_utility(one.alignment, one.quality), one.quality) for one in sketches]
        return judge([emoji.text for emoji in captions], [*map(Image.fromarray, pixels)]).numpy(), np.array(truth)

    known, unknown = ([world.draw_caption(rng, split) for _ in range(number)] for split in ("validation", "test"))
    figures = {"clean": judged(known, mutation_shares=(1.0,), clean_share=1.0)[0][:, 2].mean()}
    figures["degraded"] = judged(known, mutation_shares=(1.0,), clean_share=0.0)[0][:, 2].mean()
    found, truth = (one[:, 0] - other[:, 0] for one, other in zip(judged(known), judged(known), strict=True))
    figures["pairs"] = (found * truth > 0)[np.abs(truth) > CLEAR_GAP].mean()
    found, truth = judged(unknown, mutation_shares=(1.0,))
    figures["category"] = (found[:, 1] > 0).mean()
    figures["quality"] = np.corrcoef(found[:, 3], truth[:, 1])[0, 1]
    return {name: round(float(value), 3) for name, value in figures.items()}


def _drawn(sketches: Sequence[Sketch]) -> Tensor:
    """Draw pictures ``(N, 3, 32, 32)`` in -1..1."""
    return normalize_pictures(torch.from_numpy(np.stack([sketch.draw() for sketch in sketches])).permute(0, 3, 1, 2))


@torch.no_grad()
def _decoded(vae: AutoencoderKL, sketches: Sequence[Sketch]) -> Tensor:
    """Draw, encode and decode pictures ``(N, 3, 32, 32)`` in -1..1."""
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample for part in _drawn(sketches).split(256)]
    return torch.cat(parts).clamp(-1, 1)
