"""Score images with ImageReward: ``python score_with_image_reward.py PICTURES.jsonl SCORES.jsonl``."""

import json
import sys
from pathlib import Path


def main(pictures: str, scores: str) -> None:
    """Read images and prompts from ``pictures``, and write ImageReward's score of each image to ``scores``."""
    import ImageReward

    model = ImageReward.load("ImageReward-v1.0")
    with Path(pictures).open(encoding="utf-8") as rows, Path(scores).open("w", encoding="utf-8") as output:
        for row in map(json.loads, rows):
            score = float(model.score(row["prompt"], row["path"]))
            output.write(json.dumps({"file": row["file"], "score": score}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
