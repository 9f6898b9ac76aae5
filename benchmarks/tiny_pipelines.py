"""Measure by the pixel oracle how well the shipped tiny pipelines follow captions; prints a Markdown table.

Usage: ``python benchmarks/tiny_pipelines.py [--prompts 256] [--seed 0] [--steps 20] [--guidance 3]``. Takes about a
minute on one core.
"""

import argparse
import time

import numpy as np
import torch

from latentreward.tinyworld.captions import held_out_captions, parse_caption
from latentreward.tinyworld.drawing import draw_scene
from latentreward.tinyworld.oracle import mean_verdict
from latentreward.tinyworld.rendering import render
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline, sample_pictures


def print_row(name: str, align: float, all_right: float, quality: float, seconds: str = "") -> None:
    print(f"| {name} | {align:.3f} | {all_right:.3f} | {quality:.3f} | {seconds} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    captions = held_out_captions(options.prompts, options.seed)
    sampling = f"{options.steps} steps, guidance {options.guidance}, seed {options.seed}"
    print(f"{options.prompts} held-out captions, {sampling}\n")
    print("| pictures | align | all right | quality | CPU-s |\n|---|---|---|---|---|")
    rng = np.random.default_rng(options.seed)
    scenes = [draw_scene(parse_caption(text), rng, mutation_shares=(1.0,), clean_share=0.6) for text in captions]
    drawn = mean_verdict(captions, [render(scene) for scene in scenes])
    print_row("drawn, as in pretraining", drawn["alignment"], drawn["all_right"], drawn["quality"])
    for name, folder in PIPELINE_FOLDERS.items():
        pipeline = load_pipeline(folder)
        start = time.process_time()
        settings = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
        pictures = sample_pictures(pipeline, captions, options.seed, **settings)
        seconds = time.process_time() - start
        figures = mean_verdict(captions, list(pictures))
        print_row(name, figures["alignment"], figures["all_right"], figures["quality"], f"{seconds:.0f}")


if __name__ == "__main__":
    main()
