"""Score pictures by T2I-CompBench++ (arXiv:2307.06350), in [0, 1]; not run with the real networks.

``python score_with_t2i_compbench.py PICTURES.jsonl SCORES.jsonl REPOSITORY``, by the Python of its environment, with a
clone of github.com/Karine-Huang/T2I-CompBench. A complex prompt's score is the mean over the programs that apply, as in
3_in_1.py, which takes ten pictures a prompt only.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

BLIP = ("BLIPvqa_eval", "BLIP_vqa.py", "--out_dir", "annotation_blip")
SPATIAL = ("UniDet_eval", "2D_spatial_eval.py", "--outpath", "labels/annotation_obj_detection_2d")
DEPTH = ("UniDet_eval", "3D_spatial_eval.py", "--outpath", "labels/annotation_obj_detection_3d")
NUMBER = ("UniDet_eval", "numeracy_eval.py", "--outpath", "annotation_num")
CLIP = ("CLIPScore_eval", "CLIP_similarity.py", "--outpath", "annotation_clip")
PROGRAMS = dict.fromkeys(("color", "shape", "texture"), (BLIP,))
PROGRAMS |= {"spatial": (SPATIAL,), "3d_spatial": (DEPTH,), "numeracy": (NUMBER,), "non_spatial": (CLIP,)}
PROGRAMS["complex"] = (BLIP, SPATIAL, CLIP)


def shortened(prompt):
    """Shorten a complex prompt to the form in which the released code compares prompts."""
    return prompt.strip("\n").split(".")[0].lower()


def main(pictures, scores, repository):
    """Run each category's programs on its pictures, and write their answers by the pictures' files."""
    rows = [json.loads(line) for line in Path(pictures).read_text(encoding="utf-8").splitlines()]
    work, dataset = Path(scores).resolve().parent, Path(repository, "examples", "dataset")
    if odd := [row["prompt"] for row in rows if {"/", "_"} & set(row["prompt"])]:  # the programs read it in file names
        sys.exit(f"{odd[0][:60]!r} makes no file name; use the benchmark's own prompts")
    with Path(scores).open("w", encoding="utf-8") as output:
        for category in sorted({row["group"] for row in rows}):
            own = [row for row in rows if row["group"] == category]
            folder = work / category
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "samples").mkdir(parents=True)
            for number, row in enumerate(own):
                (folder / "samples" / f"{row['prompt']}_{number:06d}.png").symlink_to(row["path"])
            answers = []
            for room, script, option, result in PROGRAMS[category]:
                more = ["--complex", "True"] if category == "complex" and room != BLIP[0] else []
                subprocess.run([sys.executable, script, option, folder, *more], cwd=Path(repository, room), check=True)
                found = json.loads((folder / result / "vqa_result.json").read_text())
                answers.append({int(one["question_id"]): float(one["answer"]) for one in found})
            kinds = ("spatial", "action") if category == "complex" else ()
            of_kind = [set(map(shortened, (dataset / f"complex_val_{kind}.txt").open())) for kind in kinds]
            for number, row in enumerate(own):
                parts = [answer[number] for answer in answers]
                kind = [shortened(row["prompt"]) in prompts for prompts in of_kind]
                if any(kind):  # attributes, and either positions or actions
                    parts = [parts[0], parts[1] if kind[0] else parts[2]]
                output.write(json.dumps({"file": row["file"], "score": sum(parts) / len(parts)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
