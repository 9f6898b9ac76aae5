"""Score pictures by GenEval (arXiv:2310.11513), 1 for correct and 0 for wrong.

``python score_with_geneval.py PICTURES.jsonl SCORES.jsonl REPOSITORY MODELS``, by the Python of GenEval's environment.

REPOSITORY is a clone of github.com/djghosh13/geneval, and MODELS the folder that its evaluation/download_models.sh
filled. The prompts are its prompts/evaluation_metadata.jsonl, as in configs/evaluate/geneval.yaml. Written against the
repository's source; not run with the real detector.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path


def main(pictures, scores, repository, models):
    """Lay the pictures out as GenEval does, run its program, and write its verdicts by the pictures' files."""
    rows = [json.loads(line) for line in Path(pictures).read_text(encoding="utf-8").splitlines()]
    work = Path(scores).resolve().parent
    folder, output = work / "images", work / "results.jsonl"
    shutil.rmtree(folder, ignore_errors=True)
    names = {}
    for row in rows:
        if not {"tag", "include", "prompt"} <= set(row["fields"]):
            sys.exit(f"prompt {row['prompt'][:60]!r} has no tag and objects; use GenEval's evaluation_metadata.jsonl")
        picture = folder / f"{row['place']:05d}" / "samples" / f"{row['image']:04d}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.symlink_to(row["path"])  # Pillow reads other formats too, whatever the name
        (picture.parents[1] / "metadata.jsonl").write_text(json.dumps(row["fields"]), encoding="utf-8")
        names["/".join(picture.parts[-3:])] = row["file"]
    script = Path(repository).resolve() / "evaluation" / "evaluate_images.py"
    command = [sys.executable, str(script), str(folder), "--outfile", str(output), "--model-path"]
    subprocess.run([*command, str(Path(models).resolve())], cwd=script.parent, check=True)
    verdicts = {}
    for result in map(json.loads, output.read_text(encoding="utf-8").splitlines()):
        file = names["/".join(Path(result["filename"]).parts[-3:])]
        verdicts[file] = float(result["correct"])
    lines = (json.dumps({"file": file, "score": score}) + "\n" for file, score in verdicts.items())
    Path(scores).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
