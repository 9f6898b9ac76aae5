"""Measure how scores depend on batch, order, processes and precision, and the throughput; prints Markdown tables.

    python benchmarks/scoring.py [invariance] [bfloat16] [throughput] [--reward PATH ...] [--sizes mid mid_sd35]

``invariance``  in float32, for images of one shape and of mixed shapes: largest difference between batches of 8 and
                other batch sizes, and whether scores are bit-equal when repeated, in another order, and from two
                processes
``bfloat16``    difference between bfloat16 and float32 relative to the scores' standard deviation, and number of pairs
                whose order changes
``throughput``  images per second of ``RewardModel.score`` and of a bare loop over the same parts, run in turn

Each ``--reward`` is a trained reward (a checkpoint or run; ``lrm_tiny`` and ``dina_lrm_tiny`` are trained first, below
runs/trained_rewards), which scores pictures of the tiny world; ``--sizes`` are networks of ``random_pipelines.py`` with
random weights, which score pictures of noise. Everything runs in one thread.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Goal, Spread, interleaved, ratio, table
from PIL import Image
from random_pipelines import SIZES, RandomPipeline, pipeline_folder
from torch import Tensor
from trained_rewards import trained_rewards

from latentreward.core.contracts import ImageRef
from latentreward.diffusion import SD3DiTBackbone, SDUNetBackbone
from latentreward.reward import CLIPProjectionHead, GatedQFormerHead, RewardModel, ScoringNoise
from latentreward.tinyworld.pairs import draw_pairs

BATCH_SIZES = (1, 3, 7, 16, 64)
GAP = 0.05
"""Least gap of a pair whose order is compared, in standard deviations of the scores."""


def random_model(size: str) -> RewardModel:
    """Return an LRM on a U-Net or a DiNa-LRM on SD3.5 with random weights that are equal in every process."""
    pipeline = RandomPipeline(pipeline_folder(size))
    parts = (pipeline.noise_process(), pipeline.latent_space())
    torch.manual_seed(0)
    if "transformer" in SIZES[size]:
        text = pipeline.sd3_prompts(4096, 0, load_t5=False)
        dit = SD3DiTBackbone(pipeline.transformer(), *parts, text_encoder=text, vae=pipeline.latent_encoder())
        return ready(RewardModel(dit, GatedQFormerHead(dit.feature_spec)))
    unet = SDUNetBackbone(
        pipeline.unet(), *parts, text_encoder=pipeline.clip_prompts(False), vae=pipeline.latent_encoder()
    )
    return ready(RewardModel(unet, CLIPProjectionHead(unet.feature_spec)))


def ready(model: RewardModel) -> RewardModel:
    """Freeze a model, and add noise to the weights of its head, some of which are initialised to zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def load_model(name: str, dtype: torch.dtype = torch.float32) -> RewardModel:
    """Load a reward model: ``name`` is a size of :data:`SIZES`, or a path that ``from_pretrained`` takes."""
    if name in SIZES:
        return random_model(name).set_precision(dtype)
    return RewardModel.from_pretrained(name, dtype=dtype)


def pictures(name: str, count: int) -> tuple[list[str], list[bytes]]:
    """Return prompts and encoded images: pictures of the tiny world for a trained reward, else smooth noise."""
    if name not in SIZES:
        pairs = draw_pairs("test", count // 2, np.random.default_rng(0))
        return [pair.caption for pair in pairs for _ in range(2)], [
            picture.jpeg for pair in pairs for picture in (pair.first, pair.second)
        ]
    rng, encoded = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((160, 160))
        buffer = BytesIO()
        coarse.save(buffer, "JPEG", quality=95)
        encoded.append(buffer.getvalue())
    return [f"picture {index // 2} of noise" for index in range(count)], encoded


def mixed(encoded: Sequence[bytes]) -> list[Image.Image]:
    """Crop every third image to a landscape and every third to a portrait."""
    images = [Image.open(BytesIO(data)).convert("RGB") for data in encoded]
    cuts = [(1.0, 1.0), (1.0, 0.75), (0.6, 1.0)]
    return [
        image.crop((0, 0, int(image.width * cuts[n % 3][0]), int(image.height * cuts[n % 3][1])))
        for n, image in enumerate(images)
    ]


# --- invariance ----------------------------------------------------------------------------------------------------


def invariance(name: str, count: int) -> Iterator[list[Any]]:
    """Yield the rows of one model, for images of one shape and of mixed shapes."""
    model, (prompts, encoded) = load_model(name), pictures(name, count)
    for kind, images in (("one shape", list(encoded)), ("mixed shapes", mixed(encoded))):
        reference = model.score(prompts, images, batch_size=8)
        worst = max((model.score(prompts, images, batch_size=b) - reference).abs().max().item() for b in BATCH_SIZES)
        repeated = torch.equal(model.score(prompts, images, batch_size=8), reference)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        shuffled = model.score([prompts[i] for i in order], [images[i] for i in order], batch_size=8)
        same = (shuffled == reference[order]).float().mean().item()
        halves = torch.equal(in_processes(name, count, kind), reference)
        row = [short(name), kind, f"{reference.std():.3f}", f"{worst:.1e}", Goal(worst, most=2e-5)]
        yield [*row, str(repeated), f"{same:.0%}", str(halves)]


def in_processes(name: str, count: int, kind: str, processes: int = 2) -> Tensor:
    """Score images in several processes, each with a contiguous share of the images."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{rank}.pt" for rank in range(processes)]
        command = [sys.executable, __file__, "share", "--reward", name, "--images", str(count), "--kind", kind]
        running = [
            subprocess.Popen([*command, "--rank", str(rank), "--processes", str(processes), "--file", str(path)])
            for rank, path in enumerate(files)
        ]
        if any(process.wait() for process in running):
            raise RuntimeError(f"a process that scores {name} failed")
        return torch.cat([torch.load(path) for path in files])


def score_share(options: argparse.Namespace) -> None:
    """Score the share of one process of :func:`in_processes`, and save the scores."""
    name, share = options.reward[0], options.images // options.processes
    prompts, encoded = pictures(name, options.images)
    images = list(encoded) if options.kind == "one shape" else mixed(encoded)
    rows = slice(options.rank * share, (options.rank + 1) * share)
    torch.save(load_model(name).score(prompts[rows], images[rows], batch_size=8), options.file)


# --- bfloat16 ------------------------------------------------------------------------------------------------------


def bfloat16(name: str, count: int) -> Iterator[list[str]]:
    """Yield the rows of one model, one per setting of noise."""
    prompts, images = pictures(name, count)
    exact = load_model(name)
    settings = [exact.noise, ScoringNoise(sigmas=(0.2, 0.5, 0.7)), ScoringNoise(sigmas=(0.7,))]
    reference = exact.score_levels(prompts, images, settings)
    found = load_model(name, torch.bfloat16).score_levels(prompts, images, settings)
    for setting, of_float, of_half in zip(settings, reference.T, found.T, strict=True):
        spread = of_float.std()
        change = (of_half - of_float).abs() / spread
        gap, there = (scores[:, None] - scores for scores in (of_float, of_half))
        turned = int(((gap.abs() > GAP * spread) & (gap * there <= 0)).sum()) // 2
        yield [
            short(name),
            str(setting),
            f"{spread:.3g}",
            f"{change.mean():.2%}",
            f"{change.max():.2%}",
            f"{turned} of {int((gap.abs() > GAP * spread).sum()) // 2}",
        ]


# --- throughput ----------------------------------------------------------------------------------------------------


def throughput(name: str, count: int, repeats: int, batch_size: int = 8) -> list[Any]:
    """Return the row of one model."""
    model, (prompts, images) = load_model(name), pictures(name, count)
    times = interleaved(
        {
            "score": lambda: model.score(prompts, images, batch_size=batch_size),
            "loop": lambda: bare_loop(model, prompts, images, batch_size),
        },
        repeats,
    )
    rates = [Spread([count / n for n in spent.values]) for spent in times.values()]
    return [short(name), batch_size, *rates, ratio(times["score"], times["loop"])]


@torch.no_grad()
def bare_loop(model: RewardModel, prompts: Sequence[str], images: Sequence[bytes], batch_size: int) -> Tensor:
    """Score images by the bare steps (decode, encode, add noise, network, head), with noise from one generator."""
    backbone, generator = model.backbone, torch.Generator().manual_seed(0)
    assert backbone.native_size is not None and backbone.vae is not None and model.image_sizes is not None
    loader = model.image_sizes.loader(*backbone.native_size)
    sigmas = torch.tensor(model.noise.sigmas)
    timestep = backbone.noise_process.timesteps_at(sigmas) if len(sigmas) else torch.tensor(model.noise.timesteps)
    scores = []
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        pixels = torch.stack([loader(ImageRef("", data=data)) for data in images[rows]])
        latents = backbone.vae.encode(pixels)
        timesteps = timestep.repeat(len(latents))
        noisy = backbone.noise_process.add_noise(latents, torch.randn(latents.shape, generator=generator), timesteps)
        conditioning, uncond = model.encode_prompts(prompts[rows])
        scores.append(model(noisy, timesteps, conditioning, uncond))
    return torch.cat(scores)


def short(name: str) -> str:
    """Return the name of a size, or the name of the folder that holds a reward."""
    return name if name in SIZES else Path(name).parent.name


def main() -> None:
    """Run the chosen parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["invariance", "bfloat16", "throughput"], metavar="PART")
    parser.add_argument("--reward", nargs="*", default=[])
    parser.add_argument("--sizes", nargs="*", default=["mid", "mid_sd35"])
    parser.add_argument("--images", type=int, default=96, help="a multiple of 48: then all batches are full")
    parser.add_argument("--repeats", type=int, default=5)
    for internal in ("--rank", "--processes"):
        parser.add_argument(internal, type=int, help=argparse.SUPPRESS)
    for internal in ("--kind", "--file"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.parts == ["share"]:
        score_share(options)
        return
    names = [*trained_rewards(options.reward), *options.sizes]
    if "invariance" in options.parts:
        columns = ("model", "images", "sd of scores", "largest difference, batches of 1 to 64", "goal")
        exact = ("repeated", "other order: same bits", "two processes: same bits")
        rows = [row for name in names for row in invariance(name, options.images)]
        table(f"Invariance, float32, {options.images} images, batches of 8", (*columns, *exact), rows)
    if "bfloat16" in options.parts:
        columns = ("model", "noise", "sd of scores", "mean change / sd", "largest change / sd")
        rows = [row for name in names for row in bfloat16(name, options.images)]
        title = f"bfloat16 against float32, {options.images} images"
        table(title, (*columns, f"pairs over {GAP:.0%} of the sd apart turned round"), rows)
    if "throughput" in options.parts:
        columns = ("model", "batch", "score, images/s", "bare loop, images/s", "time of score / loop")
        table("Throughput", columns, [throughput(name, options.images, options.repeats) for name in names])


if __name__ == "__main__":
    main()
