"""The examples in one file: two run from training to a LoRA that diffusers reads, six score by other programs."""

import base64
import json
import sys
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from latentreward.core.errors import InputError
from latentreward.diffusion.backbones.loading import tiny_pipeline
from latentreward.reward import RewardModel
from latentreward.reward.scorers.tools import CommandScorer, JudgedPicture
from tests.reward.scorers.test_tools import pictures

FOLDER = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
def test_a_reward_is_trained_and_a_policy_aligned_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import one_file_lpo
    import one_file_lrm

    one_file_lrm.main(["--steps=2", "--pairs=64", f"--output={tmp_path / 'lrm'}"])
    reward = tmp_path / "lrm" / "reward"
    monkeypatch.setattr(one_file_lpo, "PROMPTS", 4)
    monkeypatch.setattr(one_file_lpo, "STEPS", 3)
    monkeypatch.setattr(one_file_lpo, "LOW", 0.0)
    monkeypatch.setattr(one_file_lpo, "HIGH", 0.0)
    one_file_lpo.main([str(reward), "--rounds=1", f"--output={tmp_path / 'lpo'}"])
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline("sd_tiny"), safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "lpo" / "lora")
    assert pipeline.get_active_adapters()
    assert RewardModel.from_pretrained(reward).recipe is not None
    for name in ("one_file_lrm", "one_file_lpo"):
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 200
        sys.modules.pop(name)


def environment(folder: Path, **modules: str) -> str:
    """A Python with modules of its own, as another program's environment is."""
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    return str(python)


def score(items: Sequence[JudgedPicture], work: Path, python: str, example: str, *arguments: object) -> list[float]:
    assert len((FOLDER / example).read_text().splitlines()) <= 60
    given = ["{pictures}", "{scores}", *map(str, arguments)]
    scorer = CommandScorer([python, f"examples/{example}", *given], "tool", folder=FOLDER.parent)
    scorer.prepare()
    work.mkdir(exist_ok=True)
    return scorer.score_pictures(items, "p", work).tolist()


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


def test_image_reward(tmp_path: Path) -> None:
    python = environment(tmp_path, ImageReward=IMAGE_REWARD)
    items = pictures(tmp_path / "p", ["a cat", "two dogs"])
    assert score(items, tmp_path / "w", python, "score_with_image_reward.py") == [0.5, 0.8]


@pytest.mark.parametrize("order", [("image_paths", "prompts"), ("prompts", "image_paths")])
def test_hpsv3_whichever_way_round_its_arguments_are(order: tuple[str, str], tmp_path: Path) -> None:
    python = environment(tmp_path, hpsv3=HPSV3.format(first=order[0], second=order[1]), torch=NO_GPU)
    items = pictures(tmp_path / "p", ["x" * number for number in range(1, 12)])
    assert score(items, tmp_path / "w", python, "score_with_hpsv3.py") == list(range(1, 12))


class Judge(BaseHTTPRequestHandler):
    """UnifiedReward's answers: one score to the first image, three to others."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image, text = asked["messages"][0]["content"]
        assert base64.b64decode(image["image_url"]["url"].partition(",")[2]).startswith(b"\x89PNG")
        three = "Alignment Score (1-5): 2.5\nCoherence Score (1-5): 3\nStyle Score (1-5): 3.5"
        answer = "…\nFinal Score: 4.5" if text["text"] == "Rate [a cat]" else three
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": answer}}]}).encode())


def test_unified_reward(tmp_path: Path) -> None:
    (tmp_path / "question.txt").write_text("Rate [{prompt}]")
    items = pictures(tmp_path / "p", ["a cat", "two dogs"])
    with HTTPServer(("127.0.0.1", 0), Judge) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        given = (f"http://127.0.0.1:{server.server_port}", tmp_path / "question.txt")
        scores = score(items, tmp_path / "w", environment(tmp_path), "score_with_unified_reward.py", *given)
        server.shutdown()
    assert scores == [4.5, 3.0]


MPS = """
import torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(100.0).log())
    def forward(self, text, images, condition):
        assert len(images) == 2 and condition.tolist() == [[7]]
        shown = images.mean(dim=(2, 3))[:1]
        return torch.eye(3)[text[0]], shown, shown
"""
TRANSFORMERS = """
import numpy, torch
class CLIPImageProcessor:
    from_pretrained = classmethod(lambda cls, name: cls())
    def __call__(self, image, return_tensors):
        return {"pixel_values": torch.tensor(numpy.array(image)).permute(2, 0, 1)[None] / 255 + 1}
class AutoTokenizer:
    model_max_length = 77
    from_pretrained = classmethod(lambda cls, name: cls())
    def __call__(self, text, **options):
        self.input_ids = torch.tensor([[7 if text == "light" else 0]])
        return self
"""


def test_mps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mps_model.py").write_text(MPS)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        import mps_model

        torch.save(mps_model.Model(), tmp_path / "mps.pth")
    (tmp_path / "transformers.py").write_text(TRANSFORMERS)
    items = pictures(tmp_path / "p", ["a cat"])
    command = [sys.executable, str(FOLDER / "score_with_mps.py"), "{pictures}", "{scores}"]
    scorer = CommandScorer([*command, str(tmp_path / "mps.pth"), "light"], "mps", folder=tmp_path)
    (tmp_path / "w").mkdir()
    np.testing.assert_allclose(scorer.score_pictures(items, "p", tmp_path / "w"), [100 / 3**0.5], rtol=1e-5)


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


def test_geneval_runs_on_its_own_layout(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluate_images.py").write_text(GENEVAL)
    items = pictures(tmp_path / "p", ["three bowls", "a red cup"], 2, ["counting", "colors"])
    (tmp_path / "w" / "images" / "00007" / "samples").mkdir(parents=True)  # of an earlier run
    given = (tmp_path / "w", sys.executable, "score_with_geneval.py", tmp_path, tmp_path)
    assert score(items, *given) == [1, 1, 0, 1]
    with pytest.raises(InputError, match=r"'a cat' has no tag and objects; use GenEval's evaluation_metadata.jsonl"):
        score([JudgedPicture(0, 0, "", Path(), "a cat")], *given)


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
    given = (tmp_path / "w", sys.executable, "score_with_t2i_compbench.py", compbench)
    blip, spatial, action = np.arange(6) / 10, 0.5, 0.2
    complex_scores = [*(blip[:2] + spatial) / 2, *(blip[2:4] + action) / 2, *(blip[4:] + spatial + action) / 3]
    expected = [0.0, 0.1, 0.5, 0.5, 0.25, 0.25, 0.75, 0.75, 0.3, 0.3, *complex_scores]
    for _ in range(2):  # the second time over the old results
        np.testing.assert_allclose(score(items, *given), expected)
    with pytest.raises(InputError, match="'a red_cup' makes no file name"):
        score([JudgedPicture(0, 0, "", Path(), "a red_cup", "color")], *given)
