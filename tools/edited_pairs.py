"""Add pairs of edits that an editor makes to drawn ones: ``python -m tools.edited_pairs EDITOR DRAWN --output DIR``.

A reward that learned from drawn edits alone hardly tells apart the results of one instruction that an editor makes.
"""

import argparse
import csv
import json
import shutil
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from latentreward.apps.cli import main as latentreward
from latentreward.core.contracts import sources_of
from latentreward.tinyworld.datamodule import edit_prompts
from latentreward.tinyworld.edits import judge_edit
from latentreward.tinyworld.scenes import draw_label
from latentreward.tinyworld.writers import EDIT_PARTS

SAMPLING = {"num_inference_steps": 10, "height": 32, "width": 32}
OFFSET = 1000
"""Added to the seed of a run, so that its edits are others than those that alignment with an equal seed draws."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command with ``args``; None takes the arguments of the process."""
    parser = argparse.ArgumentParser(prog="python -m tools.edited_pairs", description=__doc__)
    parser.add_argument("editor", help="folder of a tiny editor")
    parser.add_argument("drawn", type=Path, help="folder of drawn pairs of edits")
    parser.add_argument("--output", type=Path, required=True, help="folder to write: the drawn pairs and these")
    parser.add_argument("--most_drawn", type=int, default=3000, help="largest number of drawn training pairs to keep")
    parser.add_argument("--edits", type=int, default=1500, help="number of edits of the training split")
    parser.add_argument("--pictures", type=int, default=4, help="number of results of each edit")
    parser.add_argument("--seed", type=int, default=17, help="seed of the edits, of their results and of the labels")
    options = parser.parse_args(args)
    shutil.copytree(options.drawn, options.output)
    lines = (options.output / "train.jsonl").read_text().splitlines(keepends=True)
    (options.output / "train.jsonl").write_text("".join(lines[: options.most_drawn]))
    made = generate(options.editor, options.edits, options.pictures, options.output, options.seed)
    add_pairs(options.output, made, options.seed)


def generate(editor: str, edits: int, pictures: int, folder: Path, seed: int) -> Path:
    """Draw edits of the training split, and let the editor make them; return the folder of the results."""
    lines = []
    for prompt in edit_prompts("train", edits, OFFSET + seed):
        (source,) = sources_of(prompt)
        path = folder / "images" / f"{source.image_key}.jpg"
        path.write_bytes(source.data or b"")
        lines.append(json.dumps({"prompt": str(prompt), "source_images": [f"images/{path.name}"]}) + "\n")
    (folder / "edited_prompts.jsonl").write_text("".join(lines))
    settings = [f"--sampling.{name}={value}" for name, value in SAMPLING.items()]
    policy = [f"--policy.source={editor}", "--policy.t5_length=16", f"--images_per_prompt={pictures}"]
    policy += [f"--seed={seed}", "--batch_size=96"]  # small batches take twice the time
    latentreward(
        ["generate", str(folder / "edited_prompts.jsonl"), str(folder / "edited"), *policy, *settings, "--device=cpu"]
    )
    return folder / "edited"


def add_pairs(folder: Path, made: Path, seed: int) -> None:
    """Append all pairs of an edit's results that differ in utility to the training pairs, with noisy labels."""
    with (made / "images.csv").open(newline="") as file:
        results = list(csv.DictReader(file))
    rng, groups = np.random.default_rng([OFFSET + seed, 1]), dict[str, list[dict[str, str]]]()
    for result in results:
        groups.setdefault(result["place"], []).append(result)
    number = len((folder / "train.jsonl").read_text().splitlines())
    rows = pq.read_table(folder / "oracle.parquet").to_pylist()
    left_out = {f"train.jsonl:{row}" for row in range(number + 1, len(rows) + 1)}
    oracle = [row for row in rows if row["pair_id"] not in left_out]
    with (folder / "train.jsonl").open("a") as file:
        for group in groups.values():
            (source,) = json.loads(group[0]["source_images"])
            picture = Image.open(made / source).convert("RGB")
            verdicts = [judge_edit(picture, Image.open(made / one["file"]), one["prompt"]) for one in group]
            for a, b in combinations(range(len(group)), 2):
                gap = verdicts[a].utility - verdicts[b].utility
                if not gap:
                    continue
                number += 1
                files = [f"{made.name}/{name}" for name in (source, group[a]["file"], group[b]["file"])]
                row: dict[str, object] = {"prompt": group[a]["prompt"], "source_images": files[:1], "image_a": files[1]}
                row |= {"image_b": files[2], "label": draw_label(gap, 0.0, rng)}
                file.write(json.dumps(row | {"model_a": "editor", "model_b": "editor"}) + "\n")
                worth = {
                    f"{part}_{side}": float(getattr(verdicts[place], part))
                    for part in EDIT_PARTS
                    for side, place in (("a", a), ("b", b))
                }
                keys = {"pair_id": f"train.jsonl:{number}", "key_a": files[1], "key_b": files[2]}
                oracle.append(keys | worth)
    pq.write_table(pa.Table.from_pylist(oracle), folder / "oracle.parquet")


if __name__ == "__main__":
    main()
