"""Score images with HPSv3: ``python score_with_hpsv3.py PICTURES.jsonl SCORES.jsonl``."""

import json
import sys
from pathlib import Path

BATCH = 8  # images per call of HPSv3


def main(pictures: str, scores: str) -> None:
    """Read images and prompts from ``pictures``, and write the mean μ of HPSv3's score of each image to ``scores``."""
    import torch
    from hpsv3 import HPSv3RewardInferencer

    inferencer = HPSv3RewardInferencer(device="cuda" if torch.cuda.is_available() else "cpu")
    with Path(pictures).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    with Path(scores).open("w", encoding="utf-8") as output:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            # By name: 1.0.0 takes (image_paths, prompts), later releases (prompts, image_paths).
            rewards = inferencer.reward(
                image_paths=[row["path"] for row in batch], prompts=[row["prompt"] for row in batch]
            )
            for row, (mean, *_) in zip(batch, rewards.tolist()):  # noqa: B905, for Python 3.9
                output.write(json.dumps({"file": row["file"], "score": mean}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
