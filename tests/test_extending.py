"""docs/extending.md: its examples, run as a user would run them."""

import base64
import copy
import csv
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import httpx
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image

from latentreward.core.contracts import Conditioning, LatentSpace
from latentreward.reward import RewardModel
from tests.apps.serving.processes import forked_server
from tests.processes import Forked, finish

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's files in an empty folder."""
    blocks = re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    image = {"toy_image.py", "toy_image.yaml", "toy_lpo.yaml", "commands"}
    others = {"flux_backbone.py", "own_unet.py", "check_own_unet.py"}
    assert {name for name, _ in blocks} == image | others | {"toy_video.py", "toy_video.yaml"}
    return tmp_path


def fit(folder: Path, *options: str) -> Forked:
    return finish(["fit", "--config=toy_video.yaml", *options], cwd=folder)


SHORTER = {
    "--config toy_image.yaml": ["--trainer.max_steps=2", "--data.train_pairs=64", "--data.val_pairs=32"],
    "--config toy_lpo.yaml": [
        "--trainer.max_steps=1",
        "--model.sampling.num_inference_steps=4",
        "--data.prompts_per_rollout=4",
        "--data.batch_size=4",
    ],
    "serve": ["--port=0", "--device=cpu"],
}
"""What the test changes in the page's commands: their length, and what others use at the same time."""


def reload(saved: str, picture: str) -> None:
    """What a user types in another process."""
    model = RewardModel.from_pretrained(saved, trust_remote_code=True)
    print(f"score {model.score('a red circle', [picture]).item():.6f}")


@pytest.mark.rotated
@pytest.mark.slow
def test_image_example_trains_aligns_is_published_scored_and_served(folder: Path) -> None:
    (folder / "pictures").mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "pictures" / "a.png")
    commands = [line.split("#")[0].strip() for line in (folder / "commands").read_text().splitlines()]
    *commands, serve = [shlex.split(line)[1:] + options(line) for line in commands]
    assert [command[0] for command in commands] == ["fit", "fit", "publish", "score"]
    for command in commands:
        run = finish(command, cwd=folder)
        assert run.returncode == 0, run.stderr[-3000:]
        assert "is not empty" not in run.stderr  # Lightning's warning about checkpoint folders
    assert (folder / "runs" / "toy_lpo" / "lora").is_dir()
    (row,) = csv.DictReader((folder / "scores.csv").open())
    again = Forked(reload, ["published", "pictures/a.png"], cwd=folder)
    printed = again.communicate(120)[0]
    assert again.returncode == 0
    assert f"score {float(row['score']):.6f}" in printed
    with forked_server(*serve, cwd=folder) as server:
        picture = base64.b64encode((folder / "pictures" / "a.png").read_bytes()).decode()
        body = {"images": [picture], "prompt": "a red circle"}
        reply = httpx.post(f"{server.address}/v1/score_images", json=body, timeout=300).json()
    assert reply["scores"] == pytest.approx([float(row["score"])], abs=1e-5)


def options(line: str) -> list[str]:
    """What the test adds to a command of the page."""
    return [option for words, added in SHORTER.items() if words in line for option in added]


def test_video_example_trains_from_yaml_alone(folder: Path) -> None:
    run = fit(folder, "--trainer.max_steps=2", "--trainer.enable_progress_bar=false")
    assert run.returncode == 0, run.stderr[-3000:]
    (checkpoint,) = folder.rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2


@pytest.fixture
def flux(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("flux_backbone", folder / "flux_backbone.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_flux(guidance_embeds: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 4, 2),
    ).eval()


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_flux_features_equal_hooks_on_the_untouched_network(flux: ModuleType, guidance_embeds: bool) -> None:
    whole = tiny_flux(guidance_embeds)
    backbone = flux.FluxBackbone(copy.deepcopy(whole), LatentSpace(4, 8, 0.3611, 0.1159), taps=(1, 2), guidance=2.5)
    latents, timesteps = torch.randn(2, 4, 6, 8), torch.tensor([300.0, 800.0])
    conditioning = Conditioning(torch.randn(2, 5, 12), torch.randn(2, 10))
    seen = []
    for block in whole.transformer_blocks:
        block.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    with torch.no_grad():
        whole(
            FluxPipeline._pack_latents(latents, *latents.shape),
            conditioning.prompt_embeds,
            conditioning.pooled_prompt_embeds,
            timesteps / 1000,
            FluxPipeline._prepare_latent_image_ids(2, 3, 4, latents.device, latents.dtype),
            torch.zeros(5, 3),
            torch.full((2,), 2.5) if guidance_embeds else None,
        )
        features = backbone(latents, timesteps, conditioning)
    assert features.visual_grids == ((3, 4),) * 2
    for tap, (text, visual) in enumerate(seen[:2]):
        torch.testing.assert_close(features.visual[tap], visual)
        torch.testing.assert_close(features.text[tap], text)
