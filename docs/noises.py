"""Picture of eight noises, with what a reward that looks ahead says of them and the pictures that they become.

In the root of a checkout, after ``latentreward fit --config configs/align/look_ahead_tiny.yaml``::

    python docs/noises.py runs/look_ahead_tiny/look_ahead docs/images/noises.png
"""

import sys

import numpy as np
import torch
from PIL import Image

from latentreward.core.reports.drawing import RIGHT, draw_pair, tile
from latentreward.reward import RewardModel
from latentreward.tinyworld.captions import judged_captions
from latentreward.tinyworld.oracle import utility_scores
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline

CAPTIONS, NOISES, STEPS, SIDE = 48, 8, 20, 96
SHOWN = (0.75, 0.5, 0.25)
"""Shares of captions whose noises are foreseen worse than those of the captions that are shown."""


def main(reward: str, picture: str) -> None:
    """Draw the noises of three captions in the order of their predicted scores."""
    pipe, model = load_pipeline(PIPELINE_FOLDERS["sd_tiny"]), RewardModel.from_pretrained(reward)
    captions = judged_captions()[:CAPTIONS]
    cells, agreement = [], []
    for number, caption in enumerate(captions):
        noise = torch.randn(NOISES, 4, 8, 8, generator=torch.Generator().manual_seed(number))
        pipe.scheduler.set_timesteps(STEPS)
        first = pipe.scheduler.timesteps[:1].float()
        predicted = model.score_states(caption, noise[:, None], first).flatten().numpy()
        drawn = pipe(
            caption, num_images_per_prompt=NOISES, latents=noise, num_inference_steps=STEPS, guidance_scale=1.0
        ).images
        true = utility_scores([caption] * NOISES, [np.asarray(image) for image in drawn]).numpy()
        if true.std() == 0:  # all are equally good
            continue
        agreement.append(float(np.corrcoef(predicted, true)[0, 1]))
        order = np.argsort(-predicted, kind="stable")
        told = [f"said {predicted[place] - predicted.mean():+.1f} · {true[place]:.1f} of 6" for place in order]
        large = [drawn[place].resize((SIDE, SIDE), Image.Resampling.NEAREST) for place in order]
        cells.append(draw_pair(large, told, caption, RIGHT))
    ranked = np.argsort(agreement, kind="stable")
    tile([cells[ranked[round(share * (len(ranked) - 1))]] for share in SHOWN], 1).save(picture, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
