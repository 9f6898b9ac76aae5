"""Scorers that run other programs: real programs, written here, that take and leave what the real ones do."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentreward.errors import InputError
from latentreward.scorers.tools import (
    CommandScorer,
    GenEvalScorer,
    HPSv3Scorer,
    ImageRewardScorer,
    JudgedPicture,
    ScoreFile,
    T2ICompBenchScorer,
    running,
)

COUNT_ALPHA = """
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
with open(sys.argv[2], "w") as output:
    for row in rows[::-1]:
        output.write(json.dumps({"file": row["file"], "score": sum(map(str.isalpha, row["prompt"]))}) + "\\n")
"""


def pictures(
    folder: Path, prompts: Sequence[str], count: int = 1, groups: Sequence[str] | None = None, ending: str = "png"
) -> list[JudgedPicture]:
    """Pictures whose red level is 10 · place + number."""
    folder.mkdir(exist_ok=True)
    made = []
    for place, prompt in enumerate(prompts):
        for image in range(count):
            file = f"{place}_{image}.{ending}"
            level = np.full((8, 8, 3), 10 * place + image, np.uint8)
            Image.fromarray(level).save(folder / file)
            group = "" if groups is None else groups[place]
            fields = {"tag": group, "include": [], "prompt": prompt}
            made.append(JudgedPicture(place, image, file, folder / file, prompt, group, fields))
    return made


def environment(folder: Path, modules: dict[str, str], packages: dict[str, str] | None = None) -> Path:
    """A Python with modules and packages of its own, as another program's environment is."""
    site = folder / "site"
    site.mkdir(parents=True)
    for name, source in modules.items():
        (site / f"{name}.py").write_text(source)
    for name, version in (packages or {}).items():
        (site / f"{name.replace('-', '_')}-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (site / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA").write_text(metadata)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    return python


def refusal(scorer: object, items: Sequence[JudgedPicture], work: Path, policy: str = "p") -> str:
    with pytest.raises(InputError) as caught:
        scorer.score_pictures(items, policy, work)  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_any_command_scores_all_pictures(tmp_path: Path) -> None:
    (tmp_path / "count.py").write_text(COUNT_ALPHA)
    scorer = CommandScorer([sys.executable, str(tmp_path / "count.py"), "{pictures}", "{scores}"], "letters")
    scorer.prepare()
    prompts = ["a cat", 'a «"quoted"» \u2028 ü', "", "; rm -rf $HOME"]
    scores = scorer.score_pictures(pictures(tmp_path / "p", prompts), "p", tmp_path)
    assert scores.tolist() == [sum(map(str.isalpha, prompt)) for prompt in prompts]


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    items = pictures(tmp_path / "p", ["a cat", "a dog"])

    def command(source: str, **options: float) -> CommandScorer:
        return CommandScorer([sys.executable, "-c", source, "{pictures}", "{scores}"], "tool", **options)

    source = "import sys; print('begins', flush=True); sys.exit('CUDA out of memory')"
    failed = refusal(command(source), items, tmp_path)
    assert "tool: python" in failed
    assert "status 1; last line: 'CUDA out of memory', all in " in failed
    assert (tmp_path / "log.txt").read_text().splitlines() == ["begins", "CUDA out of memory"]
    assert "it said nothing" in refusal(command("import os; os._exit(3)"), items, tmp_path)
    assert "no table of scores" in refusal(command("pass"), items, tmp_path)
    half = 'import sys; open(sys.argv[2], \'w\').write(\'{"file": "0_0.png", "score": 1}\')'
    assert "has no row for '1_0.png'" in refusal(command(half), items, tmp_path)
    nan = half.replace("1}", "NaN}")
    assert "0_0.png" in refusal(command(nan), items[:1], tmp_path)
    gone = CommandScorer(["no-such-program", "{scores}"], "tool")
    with pytest.raises(InputError, match="no-such-program is no program"):
        gone.prepare()
    assert "cannot run no-such-program" in refusal(gone, items, tmp_path)


def test_a_relative_program_is_one_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool/count.py").write_text(f"#!{sys.executable}{COUNT_ALPHA}")
    (tmp_path / "tool/count.py").chmod(0o755)
    command, items = ["./count.py", "{pictures}", "{scores}"], pictures(tmp_path / "p", ["a cat"])
    scorer = CommandScorer(command, "letters", folder=tmp_path / "tool")
    scorer.prepare()
    assert scorer.score_pictures(items, "p", tmp_path).tolist() == [4.0]
    monkeypatch.chdir(tmp_path / "tool")  # where the program is not started
    for folder in (None, tmp_path):
        with pytest.raises(InputError, match=r"\./count\.py is no program; give its whole path"):
            CommandScorer(command, "letters", folder=folder).prepare()


def test_a_copy_without_history_has_not_the_commit_of_the_work_tree_around_it(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "geneval").mkdir()
    assert len(running.commit_of(tmp_path)) == 40
    assert running.commit_of(tmp_path / "geneval") == "unknown"


def test_a_python_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "ANSWER_S", 0.1)
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    with pytest.raises(InputError, match=r"python of imagereward: \S+slow does not tell its packages within 0\.1 s"):
        ImageRewardScorer(slow).prepare()


@pytest.mark.slow
def test_a_program_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    source = (
        "import subprocess, sys, time; child = subprocess.Popen(['sleep', '60']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    scorer = CommandScorer([sys.executable, "-c", source, "{scores}"], "tool", timeout_s=2)
    start = time.monotonic()
    message = refusal(scorer, pictures(tmp_path / "p", ["a cat"]), tmp_path)
    assert time.monotonic() - start < 20
    assert "no result after timeout_s=2" in message
    child = int((tmp_path / "log.txt").read_text())
    for _ in range(100):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        pytest.fail("the child lives on")


IMAGE_REWARD = """
def load(name):
    assert name == "ImageReward-v1.0"
    class Model:
        def score(self, prompt, image):
            return len(prompt) / 10
    return Model()
"""
HPSV3 = """
class Rewards(list):
    def tolist(self):
        return list(self)
class HPSv3RewardInferencer:
    def __init__(self, device):
        assert device == "cpu"
    def reward(self, {first}, {second}):
        assert all(path.endswith(".png") for path in image_paths)
        return Rewards([len(prompt), 0.5] for prompt in prompts)
"""
NO_GPU = "class cuda:\n    is_available = staticmethod(lambda: False)\n"


def test_image_reward_in_an_environment_of_its_own(tmp_path: Path) -> None:
    python = environment(tmp_path / "env", {"ImageReward": IMAGE_REWARD}, {"image-reward": "1.5"})
    scorer = ImageRewardScorer(python)
    scorer.prepare()
    assert scorer.identity() == "ImageRewardScorer image-reward 1.5"
    scores = scorer.score_pictures(pictures(tmp_path / "p", ["a cat", "two dogs"]), "p", tmp_path)
    assert scores.tolist() == [0.5, 0.8]


@pytest.mark.parametrize("order", [("image_paths", "prompts"), ("prompts", "image_paths")])
def test_hpsv3_whichever_way_round_its_arguments_are(order: tuple[str, str], tmp_path: Path) -> None:
    modules = {"hpsv3": HPSV3.format(first=order[0], second=order[1]), "torch": NO_GPU}
    scorer = HPSv3Scorer(environment(tmp_path / "env", modules, {"hpsv3": "1.0.0"}))
    scorer.prepare()
    prompts = [f"{'x' * number}" for number in range(1, 12)]
    assert scorer.score_pictures(pictures(tmp_path / "p", prompts), "p", tmp_path).tolist() == list(range(1, 12))


def test_an_environment_that_lacks_something_is_found_out_before_anything_is_sampled(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="python of imagereward is not given"):
        ImageRewardScorer()
    with pytest.raises(InputError, match="gone/python is no program"):
        ImageRewardScorer(tmp_path / "gone" / "python")
    python = environment(tmp_path / "env", {})
    with pytest.raises(InputError, match="lacks one of hpsv3; install them there"):
        HPSv3Scorer(python).prepare()


def test_a_table_of_scores(tmp_path: Path) -> None:
    items = pictures(tmp_path / "p", ["a cat", "a dog"], count=2)
    (tmp_path / "base.csv").write_text("file,hpsv3\n1_1.png,4\n0_0.png,1\n0_1.png,2\n1_0.png,3\n")
    scorer = ScoreFile(str(tmp_path / "{policy}.csv"), "hpsv3")
    assert (scorer.name, scorer.score_pictures(items, "base", tmp_path).tolist()) == ("hpsv3", [1, 2, 3, 4])
    assert "hpsv3: no table of scores" in refusal(scorer, items, tmp_path, "tuned")
    rows = [{"place": place, "image": image, "s": place - image} for place in (1, 0) for image in (0, 1)]
    (tmp_path / "places.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    by_place = ScoreFile(str(tmp_path / "places.jsonl"), "s")
    assert by_place.score_pictures(items, "x", tmp_path).tolist() == [0, -1, 1, 0]
    for content, message in {
        "file,hpsv3\n0_0.png,1\n0_0.png,2\n": "several rows for '0_0.png'",
        "file,other\n0_0.png,1\n": "it needs 'hpsv3', and 'file'",
        "file,hpsv3\n0_0.png,bad\n": "holds 'bad' for '0_0.png'; it must be a number",
        "file,hpsv3\n0_0.png,inf\n": "it must be a finite number",
        "file,hpsv3\n0_0.png,1\n": "has no row for '0_1.png'",
        "": "not a whole csv file",
    }.items():
        (tmp_path / "base.csv").write_text(content)
        assert message in refusal(scorer, items, tmp_path, "base")


def test_a_name_that_several_pictures_share_names_none(tmp_path: Path) -> None:
    made = ((place, pictures(tmp_path / place, ["a cat"])[0]) for place in "ab")
    items = [replace(item, file=f"{place}/{item.file}") for place, item in made]
    scorer = ScoreFile(str(tmp_path / "scores.csv"), "s")
    (tmp_path / "scores.csv").write_text("file,s\n0_0.png,1\n")
    assert "has no row for 'a/0_0.png'; write one for each picture, by its path" in refusal(scorer, items, tmp_path)
    (tmp_path / "scores.csv").write_text("file,s\na/0_0.png,1\nb/0_0.png,2\n")
    assert scorer.score_pictures(items, "p", tmp_path).tolist() == [1, 2]


GENEVAL = """
import argparse, json, os
parser = argparse.ArgumentParser()
parser.add_argument("imagedir"); parser.add_argument("--outfile"); parser.add_argument("--model-path")
args = parser.parse_args()
assert os.path.isdir(args.model_path)
with open(args.outfile, "w") as output:
    for folder in os.listdir(args.imagedir):
        metadata = json.load(open(os.path.join(args.imagedir, folder, "metadata.jsonl")))
        for name in os.listdir(os.path.join(args.imagedir, folder, "samples")):
            assert open(os.path.join(args.imagedir, folder, "samples", name), "rb").read(4) == b"\\x89PNG"
            row = {"filename": os.path.join(args.imagedir, folder, "samples", name), "tag": metadata["tag"],
                   "prompt": metadata["prompt"], "correct": metadata["tag"] == "counting" or name == "0001.png",
                   "metadata": json.dumps(metadata)}
            output.write(json.dumps(row) + "\\n")
"""


def geneval(folder: Path, source: str = GENEVAL) -> GenEvalScorer:
    (folder / "geneval" / "evaluation").mkdir(parents=True)
    (folder / "geneval" / "evaluation" / "evaluate_images.py").write_text(source)
    (folder / "models").mkdir()
    python = environment(folder / "env", {}, {"mmdet": "2.28.2", "open-clip-torch": "2.20.0"})
    return GenEvalScorer(folder / "geneval", python, folder / "models")


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_geneval_runs_on_its_own_layout(ending: str, tmp_path: Path) -> None:
    scorer = geneval(tmp_path)
    items = pictures(tmp_path / "p", ["three bowls", "a red cup"], 2, ["counting", "colors"], ending)
    scorer.check(items)
    scorer.prepare()
    assert scorer.identity() == "GenEvalScorer commit unknown mmdet 2.28.2 open-clip-torch 2.20.0"
    (tmp_path / "images" / "00007" / "samples").mkdir(parents=True)  # of an earlier run
    assert scorer.score_pictures(items, "p", tmp_path).tolist() == [1, 1, 0, 1]
    assert scorer.headline == "mean_of_groups"
    imported = GenEvalScorer(results=str(tmp_path / "{policy}.jsonl"))
    assert imported.score_pictures(items, "results", tmp_path).tolist() == [1, 1, 0, 1]


def test_geneval_refuses_what_is_not_of_these_pictures(tmp_path: Path) -> None:
    items = pictures(tmp_path / "p", ["three bowls", "a red cup"], 1, ["counting", "colors"])
    rows = [
        {"filename": f"/x/{place:05d}/samples/0000.png", "prompt": item.prompt, "correct": True, "tag": item.group}
        for place, item in enumerate(items)
    ]

    def said(*found: object) -> str:
        (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        return refusal(GenEvalScorer(results=str(tmp_path / "r.jsonl")), items, tmp_path)

    assert "has no result for 00001/samples/0000.png" in said(rows[0])
    swapped = [row | {"prompt": other["prompt"]} for row, other in zip(rows, rows[::-1], strict=True)]
    assert "give results of the same prompts in the same order" in said(*swapped)
    assert "holds no results of GenEval" in said({"filename": "a.png"})
    assert "holds no results of GenEval (correct: 'false')" in said(rows[0] | {"correct": "false"})
    again = rows[0] | {"filename": "/y/00000/samples/0000.png", "correct": False}
    assert "holds no results of GenEval (two rows for 00000/samples/0000.png)" in said(*rows, again)
    assert "no file" in refusal(GenEvalScorer(results=str(tmp_path / "gone.jsonl")), items, tmp_path)
    plain = JudgedPicture(0, 0, "", Path(), "a cat")
    with pytest.raises(InputError, match=r"prompt 'a cat' has no tag .* evaluation_metadata.jsonl"):
        GenEvalScorer(results="x").check([plain])
    with pytest.raises(InputError, match="python of geneval is not given"):
        GenEvalScorer()
    with pytest.raises(InputError, match="repository of geneval is not given"):
        GenEvalScorer(python=Path(sys.executable))
    broken = geneval(tmp_path / "broken", "raise RuntimeError('no kernel image')")
    assert "RuntimeError: no kernel image" in refusal(broken, items, tmp_path)


T2I = """
import argparse, json, os, sys
parser = argparse.ArgumentParser()
parser.add_argument("--out_dir"); parser.add_argument("--outpath"); parser.add_argument("--complex", type=bool)
args = parser.parse_args()
folder = args.out_dir or args.outpath
names = sorted(os.listdir(os.path.join(folder, "samples")), key=lambda name: int(name.split("_")[-1].split(".")[0]))
assert [int(name.split("_")[1].split(".")[0]) for name in names] == list(range(len(names)))
assert os.path.basename(os.getcwd()) == "{place}"
answers = [{{"question_id": number, "answer": {answer}}} for number in range(len(names))]
os.makedirs(os.path.join(folder, "{result}"))
with open(os.path.join(folder, "{result}", "vqa_result.json"), "w") as output:
    json.dump(answers[::-1], output)
"""
PROGRAMS = {
    "BLIPvqa_eval/BLIP_vqa.py": ("annotation_blip", "f'{0.1 * number:.4f}'"),
    "UniDet_eval/2D_spatial_eval.py": ("labels/annotation_obj_detection_2d", "0.5"),
    "UniDet_eval/3D_spatial_eval.py": ("labels/annotation_obj_detection_3d", "0.25"),
    "UniDet_eval/numeracy_eval.py": ("annotation_num", "0.75"),
    "CLIPScore_eval/CLIP_similarity.py": ("annotation_clip", "0.3 if args.complex is None else 0.2"),
}


@pytest.fixture
def compbench(tmp_path: Path) -> Path:
    repository = tmp_path / "T2I-CompBench"
    for script, (result, answer) in PROGRAMS.items():
        path = repository / script
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(T2I.format(place=path.parent.name, result=result, answer=answer))
    (repository / "examples" / "dataset").mkdir(parents=True)
    (repository / "examples" / "dataset" / "complex_val_spatial.txt").write_text("The Red cup on a mat.\n")
    (repository / "examples" / "dataset" / "complex_val_action.txt").write_text("the boy kicks a big ball.\n")
    return repository


@pytest.mark.slow
def test_t2i_compbench_runs_the_right_programs(compbench: Path, tmp_path: Path) -> None:
    groups = ["color", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex", "complex", "complex"]
    prompts = ["a red cup", "b", "c", "d", "e", "the red cup on a mat.", "The boy kicks a big ball.", "both of them."]
    items = pictures(tmp_path / "p", prompts, 2, groups)
    scorer = T2ICompBenchScorer(compbench, Path(sys.executable))
    scorer.check(items)
    scorer.prepare()
    blip, spatial, action = np.arange(6) / 10, 0.5, 0.2
    complex_scores = [*(blip[:2] + spatial) / 2, *(blip[2:4] + action) / 2, *(blip[4:] + spatial + action) / 3]
    expected = [0.0, 0.1, 0.5, 0.5, 0.25, 0.25, 0.75, 0.75, 0.3, 0.3, *complex_scores]
    np.testing.assert_allclose(scorer.score_pictures(items, "p", tmp_path / "w"), expected)
    np.testing.assert_allclose(scorer.score_pictures(items, "p", tmp_path / "w"), expected)  # over the old results
    imported = T2ICompBenchScorer(compbench, results=str(tmp_path / "{policy}"))
    np.testing.assert_allclose(imported.score_pictures(items, "w", tmp_path), expected)


def test_t2i_compbench_refuses_what_it_cannot_judge(compbench: Path, tmp_path: Path) -> None:
    scorer = T2ICompBenchScorer(compbench, Path(sys.executable))
    for prompt, group, message in [
        ("a red cup", "colour", "group 'colour' is none of color"),
        ("a red/blue cup", "color", "makes no file name"),
        ("a red_cup", "color", "makes no file name"),
        ("x" * 260, "color", "makes no file name"),
    ]:
        with pytest.raises(InputError, match=message):
            scorer.check([JudgedPicture(0, 0, "", Path(), prompt, group)])
    with pytest.raises(InputError, match=r"no .*complex_val_spatial.txt for complex prompts; set repository"):
        T2ICompBenchScorer(results="x").check([JudgedPicture(0, 0, "", Path(), "a", "complex")])
    with pytest.raises(InputError, match="holds no BLIPvqa_eval"):
        T2ICompBenchScorer(tmp_path, Path(sys.executable))
    items = pictures(tmp_path / "p", ["a red cup"], 2, ["color"])
    imported = T2ICompBenchScorer(results=str(tmp_path / "r"))
    assert "vqa_result.json, which BLIP_vqa.py writes" in refusal(imported, items, tmp_path)
    (tmp_path / "r" / "color" / "annotation_blip").mkdir(parents=True)
    result = tmp_path / "r" / "color" / "annotation_blip" / "vqa_result.json"
    for content, message in {
        '[{"question_id": 0, "answer": "0.5"}]': "has 1 answers for 2 pictures",
        '[{"question_id": 0, "answer": "yes"}]': "holds no answers",
        '[{"question_id": 0, "answer": 1}, {"question_id": 1, "answer": 1}, {"question_id": 1, "answer": 0}]': (
            "has 3 answers for 2 pictures"
        ),
        '[{"question_id": 0, "answer": NaN}, {"question_id": 1, "answer": 1}]': "has 2 answers for 2 pictures",
        "{": "holds no answers",
    }.items():
        result.write_text(content)
        assert message in refusal(imported, items, tmp_path)
