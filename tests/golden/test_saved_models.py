"""A published checkpoint, saved as a model folder and loaded again, gives the recorded scores bit for bit as before."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from latentreward.reward import RewardModel
from tests.golden.catalogue import Case, cases
from tests.golden.closeness import assert_close
from tests.golden.test_dina_backbone import FLOAT32_EPS, SCORE, model_of, score_at
from tests.reward.scoring.models import load_dina_lrm, load_lrm
from tests.tiny_pipelines import pipeline_folder, vae

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def small_tokenizer(folder: Path, text_encoder: dict[str, Any]) -> None:
    """A tokenizer of at most as many tokens as the recorded text encoder has."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *(f"word{n}" for n in range(60))]
    words = [*words[: text_encoder["vocab_size"] - 2], "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    length = text_encoder["max_position_embeddings"]
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length).save_pretrained(folder)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def base_of_lrm(checkpoint: Path, family: str, folder: Path) -> Path:
    """A pipeline around networks of the recorded shapes, of which only tokenizer, scheduler and VAE will be read."""
    template = Path(pipeline_folder(family))
    folder.mkdir()
    shutil.copyfile(template / "model_index.json", folder / "model_index.json")
    shutil.copytree(template / "scheduler", folder / "scheduler")
    scale = load_lrm(checkpoint).backbone.latent_space.scaling_factor
    AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        scaling_factor=scale,
    ).save_pretrained(folder / "vae")
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if (checkpoint / part).is_dir():
            (folder / part).mkdir()
            shutil.copyfile(checkpoint / part / "config.json", folder / part / "config.json")
    small_tokenizer(folder / "tokenizer", config_of(folder / "text_encoder"))
    if family == "sdxl":
        small_tokenizer(folder / "tokenizer_2", config_of(folder / "text_encoder_2"))
    return folder


def base_of_dina(bare: Path, folder: Path) -> Path:
    """The recorded transformer and scheduler, with text encoders and a VAE that fit."""
    shutil.copytree(pipeline_folder("sd35_no_t5"), folder, ignore=shutil.ignore_patterns("transformer", "vae"))
    shutil.copytree(bare / "transformer", folder / "transformer")
    pooled = config_of(bare / "transformer")["pooled_projection_dim"]
    for part, width in {"text_encoder": pooled // 2, "text_encoder_2": pooled - pooled // 2}.items():
        text = CLIPTextConfig.from_pretrained(folder / part, projection_dim=width)
        CLIPTextModelWithProjection(text).save_pretrained(folder / part)
    shutil.copytree(bare / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    vae(1.5305, channels=16, shift_factor=0.0609).save_pretrained(folder / "vae")
    return folder


def saved_and_loaded(model: RewardModel, folder: Path, base: Path) -> RewardModel:
    model.save_pretrained(folder)
    return RewardModel.from_pretrained(folder, base=str(base))


@torch.no_grad()
def lrm_scores(model: RewardModel, ids: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    encoded = model.backbone.text_encoder.encode_ids(*ids)
    side = model.backbone.unet.config.sample_size
    latents = torch.randn(len(ids[0]), 4, side, side, generator=generator)
    uncond = encoded.select([0])
    return model(latents, torch.full((len(latents),), 401.0), encoded, uncond)


@pytest.mark.parametrize("case", [*cases("lpo/01"), *cases("lpo/02")], ids=lambda case: case.name)
def test_lrm(case: Case, tmp_path: Path) -> None:
    checkpoint, xl = case.folder("checkpoint"), case.group.endswith("02")
    base = base_of_lrm(checkpoint, "sdxl" if xl else "sd15", tmp_path / "base")
    model = load_lrm(checkpoint, base=str(base))
    texts = [config_of(checkpoint / part) for part in ("text_encoder", "text_encoder_2")[: 1 + xl]]
    ids = [
        torch.randint(
            text["vocab_size"], (2, text["max_position_embeddings"]), generator=torch.Generator().manual_seed(1)
        )
        for text in texts
    ]
    again = saved_and_loaded(model, tmp_path / "saved", base)
    assert torch.equal(lrm_scores(again, ids), lrm_scores(model, ids))
    assert torch.equal(lrm_scores(again, ids), lrm_scores(load_lrm(checkpoint), ids))


@pytest.mark.parametrize("case", cases("dina/backbone"), ids=lambda case: case.name)
@torch.no_grad()
def test_dina_lrm(case: Case, tmp_path: Path) -> None:
    bare = (case.path.parent / case.options["base_dir"]).parent
    base, data = base_of_dina(bare, tmp_path / "base"), case.tensors()
    rms_eps = case.options.get("rms_eps") or FLOAT32_EPS
    model = load_dina_lrm(case.path.parent, base=str(base), rms_eps=rms_eps)
    again = saved_and_loaded(model, tmp_path / "saved", base)
    for name in data.below("single.u"):
        level = float(name.removesuffix(".score"))
        score = score_at(again, data, level)
        assert torch.equal(score, score_at(model_of(case), data, level))
        assert_close(score.reshape(len(score), -1), data[f"single.u{name}"], name, **SCORE)
    ensemble = score_at(again, data, *case.options["ensemble_u"])
    assert_close(ensemble.reshape(len(ensemble), -1), data["ens.score"], "ens", **SCORE)
