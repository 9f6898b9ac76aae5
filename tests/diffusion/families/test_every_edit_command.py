"""Every command with editors: cache, fit, score, publish, serve, benchmark, align, generate, export, evaluate."""

import base64
import csv
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from latentreward.apps.cli import main
from latentreward.tinyworld.writers import write_hpdv3
from tests.apps.serving.processes import forked_server
from tests.core.settings.test_refusals import refusal
from tests.diffusion.families.made_qwen_image_edit import qwen_image_edit_folder
from tests.diffusion.families.test_every_command import RED, SIZE, run, trainer
from tests.diffusion.families.twins import TWINS, Twin
from tests.marks import release_after
from tests.tiny_pipelines import pipeline_folder

EDITORS = ("klein_base", "ip2p_sd15", "flux1_kontext", "qwen_image_edit")


class UNet:
    """InstructPix2Pix, as what the tests read of a twin."""

    family, backbone, guidance, options = "sd", "ip2p_sd15", None, {}
    folder = property(lambda self: pipeline_folder("ip2p_sd15"))


class Seeing:
    """Qwen-Image-Edit, as what the tests read of a twin."""

    family = backbone = "qwen_image_edit"
    guidance, options, layers = None, {}, 4
    folder = property(lambda self: qwen_image_edit_folder())


TEXTS = ("make it red", "make it red", "remove the circle", "add a square")


def write_edits(folder: Path) -> None:
    """Pairs and prompts of edits of pictures of the tiny world; two instructions are equal, their pictures are not."""
    write_hpdv3(folder / "drawn", {"train": 8, "test": 4})
    pictures = sorted(path.relative_to(folder) for path in folder.rglob("*.jpg"))
    rows = [
        {"prompt": TEXTS[row % 4], "source_images": [str(pictures[row])], "image_a": str(pictures[row + 1]),
         "image_b": str(pictures[row + 2]), "label": float(row % 2)}
        for row in range(8)
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": row["prompt"], "source_images": row["source_images"]} for row in rows[:4]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    listed = [{"image": row["image_a"], "prompt": row["prompt"], "source_images": row["source_images"]} for row in rows]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))


def fitted(twin: Twin) -> dict[str, Any]:
    if twin.family == "sd":
        head: dict[str, Any] = {"class_path": "CLIPProjectionHead", "init_args": {"guidance": 2.0}}
        arguments = {"backbone": {"class_path": twin.backbone, "init_args": {"source": twin.folder}}, "head": head}
        module = "LRMModule"
    else:
        taps = [*range(1, twin.layers)]
        backbone = {"source": twin.folder, "visual_taps": taps, "text_taps": taps, "tuning": "lora"}
        head = {"class_path": "GatedQFormerHead", "init_args": {"num_queries": 2, "num_heads": 2}}
        arguments = {"backbone": {"class_path": twin.backbone, "init_args": backbone}, "head": head,
                     "loss": {"class_path": "ThurstoneLoss"}}  # fmt: skip
        module = "DiNaLRMModule"
    reader = {"class_path": "latentreward.data.JSONLPairReader", "init_args": {"file": "edits/pairs.jsonl"}}
    data = {"train": reader, "val": reader, "test": reader, "predict": reader, "size": SIZE, "batch_size": 4,
            "shared_prompts": "keep", "num_workers": 0}  # fmt: skip
    return {"model": {"class_path": f"latentreward.reward.{module}", "init_args": arguments},
            "data": {"class_path": "latentreward.data.PreferenceDataModule", "init_args": data},
            "trainer": trainer("reward")}  # fmt: skip


def cache(twin: Twin) -> dict[str, Any]:
    """Cache the pairs, and return the settings of a training on them that is like :func:`fitted`."""
    settings = fitted(twin)
    encoder = {"class_path": "PipelineEncoders", "init_args": {"source": twin.folder, "text": True, "batch_size": 4}}
    images = {"size": SIZE, "resize": "stretch"}
    run("cache", {"reader": settings["data"]["init_args"]["train"], "encoder": encoder, "images": images,
                  "dtype": "float32", "num_workers": 0, "device": "cpu"}, "cache")  # fmt: skip
    data = {"train": {"cache": "cache"}, "batch_size": 4, "num_workers": 0, "shared_prompts": "keep",
            "cached_text": twin.family != "sd"}  # an LRM trains its text encoder  # fmt: skip
    settings["data"] = {"class_path": "latentreward.diffusion.CachedPreferenceDataModule", "init_args": data}
    return settings | {"trainer": trainer("of_cache")}


def serve(base: str, folder: Path) -> list[float]:
    """Serve the published reward, and return the scores of the list's first two rows, which have one instruction."""
    rows = [json.loads(line) for line in Path("edits/list.jsonl").read_text().splitlines()[:2]]
    encoded = [[base64.b64encode((folder / "edits" / name).read_bytes()).decode() for name in names]
               for names in zip(*((row["image"], row["source_images"][0]) for row in rows), strict=True)]  # fmt: skip
    body = {"prompts": [row["prompt"] for row in rows], "images": encoded[0],
            "source_images": [[one] for one in encoded[1]]}  # fmt: skip
    with forked_server("serve", "published", base, "--port=0", "--device=cpu", cwd=folder) as server:
        reply = httpx.post(f"{server.address}/v1/score_images", json=body, timeout=300)
    scores: list[float] = reply.json()["scores"]
    return scores


def scores_of(model: str, *options: str) -> list[float]:
    main(["score", "edits/list.jsonl", f"{model}.csv", f"--model={model}", "--device=cpu", *options])
    return [float(row["score"]) for row in csv.DictReader(Path(f"{model}.csv").read_text().splitlines())]


def align(twin: Twin) -> None:
    sampling = {"num_inference_steps": 3, "height": SIZE, "width": SIZE}
    shown = {"prompts": "edits/prompts.jsonl", "every_n_steps": 1, "sampling": sampling}
    policy = {"source": twin.folder, "lora": {"rank": 2, "alpha": 4}, **twin.options}
    stored = {"class_path": "LatentReward", "init_args": {"path": "published", "base": twin.folder}}
    parts = [stored, {"class_path": "UnchangedRegion"}]
    mixture = {"class_path": "RewardMixture",
               "init_args": {"rewards": parts, "weights": [1.0, 0.5], "normalise": "none"}}  # fmt: skip
    arguments = {"policy": policy, "reward": mixture, "sampling": sampling, "candidates": {"num_candidates": 2},
                 "selection": "QuantileThreshold", "guidance_scale": twin.guidance}  # fmt: skip
    data = {"prompts": "edits/prompts.jsonl", "batch_size": 2, "prompts_per_rollout": 2, "batches_per_epoch": 2}
    callbacks = [
        {"class_path": "SampleGrid", "init_args": shown},
        {"class_path": "HackingMonitor", "init_args": {**shown, "held_out": RED, "action": "warn"}},
        "PolicyLoRA",
        "EncodeOnce",
    ]
    run("fit", {"model": {"class_path": "latentreward.alignment.LPOModule", "init_args": arguments},
                "data": {"class_path": "latentreward.data.PromptDataModule", "init_args": data},
                "trainer": trainer("aligned", *callbacks)})  # fmt: skip


@pytest.mark.rotated
@pytest.mark.slow
@pytest.mark.parametrize("name", release_after(1, EDITORS))
def test_every_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    twin: Any = {"ip2p_sd15": UNet(), "qwen_image_edit": Seeing()}.get(name) or TWINS[name]
    write_edits(Path("edits"))
    main(["inspect", "--reader=JSONLPairReader", "--reader.file=edits/pairs.jsonl"])
    run("fit", fitted(twin))
    checkpoint = str(next(Path("reward").rglob("last.ckpt")))
    for command in ("test", "predict"):
        run(command, fitted(twin), f"--ckpt_path={checkpoint}")
    main(["publish", "reward", "published", "--licence=mit"])
    base = f"--base={twin.folder}"
    scores = scores_of("reward", "--gallery=gallery.html")
    assert len({*scores}) == 8 and scores_of("published", base) == pytest.approx(scores, abs=1e-5)
    assert Path("gallery.html").read_text().count('alt="edited picture"') == 8
    assert serve(base, tmp_path) == pytest.approx(scores[:2], abs=1e-4)
    run("fit", cache(twin))
    assert list(Path("of_cache").rglob("last.ckpt"))
    main(["benchmark", "benched", "--data=edits/pairs.jsonl", "--model=reward"])
    assert json.loads(Path("benched/report.json").read_text())["protocols"]
    align(twin)
    assert list(Path("aligned").rglob("samples/*.png")) and list(Path("aligned").rglob("*.safetensors"))
    sampling = [f"--sampling.{name}={value}" for name, value in
                {"num_inference_steps": 2, "height": SIZE, "width": SIZE}.items()]  # fmt: skip
    checkpoint = str(next(Path("aligned").rglob("last.ckpt")))
    stored = {"class_path": "LatentReward", "init_args": {"path": "published", "base": twin.folder}}
    reward = f"--reward={json.dumps(stored)}"
    main(["generate", "edits/prompts.jsonl", "made", f"--checkpoint={checkpoint}", *sampling, "--best_of=2", reward])
    assert Image.open(next(Path("made").glob("0*.png"))).size == (SIZE, SIZE)
    main(["score", "made", "made.csv", "--model=published", base, "--device=cpu"])  # its table names the pictures
    with Path("made.csv").open() as file:
        assert len([*csv.DictReader(file)]) == 4
    main(["export", checkpoint, "exported"])
    against = [f"--against.pipeline.source={twin.folder}", "--against.lora=exported"]
    main(["evaluate-policy", "judged", "--prompts=edits/prompts.jsonl", f"--policy.pipeline.source={twin.folder}",
          *against, f"--scorers=[{json.dumps(RED)}]", *sampling, "--device=cpu"])  # fmt: skip
    assert json.loads(Path("judged/report.json").read_text())
    assert Path("judged/report.html").read_text().count("<figcaption>source</figcaption>") == 4
    main(["evaluate-policy", "again", "--prompts=edits/prompts.jsonl", "--policy.images=made", "--device=cpu",
          f"--scorers=[{json.dumps(RED)}]"])  # fmt: skip
    with Path("edits/prompts.jsonl").open("a") as file:
        file.write('{"prompt": "a cat"}\n')
    run("fit", fitted(twin), f"--ckpt_path={Path('reward').rglob('last.ckpt').__next__()}", "--trainer.max_steps=3")
    assert "picture" in refusal(capsys, "generate", "edits/prompts.jsonl", "no", f"--checkpoint={checkpoint}")
