"""Runs, a cache, published folders and scores that ``bit_equal.py`` lets two versions of the program make.

Only the command line and ``RewardModel`` are used, so that both versions can run it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from latentreward.apps.cli import main as latentreward
from latentreward.reward import RewardModel, ScoringNoise
from latentreward.tinyworld.writers import write_pickapic
from tests import tiny_pipelines

PROMPTS = ("a red circle", "two blue squares", "a cat", "a dog on a hill", "")
MODELS = {
    "lrm": ScoringNoise(timesteps=(1, 401)),
    "dina": ScoringNoise(sigmas=(0.2, 0.5)),
    "lrm_published": ScoringNoise(timesteps=(1, 401)),
    "dina_published": ScoringNoise(sigmas=(0.2, 0.5)),
}
"""Folders that hold a reward model, and the noise at which they score."""

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "max_steps": 5,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 1,
    "gradient_clip_val": 1.0,
    "logger": {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": ".", "name": "${trainer.default_root_dir}", "version": ""},
    },
    "callbacks": [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"save_last": True, "save_top_k": 0, "save_on_train_epoch_end": True},
        },
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"filename": "last-step", "every_n_train_steps": 3, "enable_version_counter": False},
        },
        {"class_path": "latentreward.callbacks.TrainableCheckpoint"},
    ],
}
AVERAGE = {"class_path": "latentreward.callbacks.TrainableEMA", "init_args": {"decay": 0.9}}
OPTIMIZER = {
    "class_path": "torch.optim.AdamW",
    # Its default eps of 1e-8 makes steps as large as the rate from gradients that are nothing but rounding errors, and
    # those differ between machines.
    "init_args": {"lr": 1.0e-2, "eps": 1.0e-3},
}
READER = {"class_path": "latentreward.data.PickAPicReader", "init_args": {"source": "pairs"}}
PAIRS = {
    "class_path": "latentreward.data.PreferenceDataModule",
    "init_args": {
        "size": 16,
        "batch_size": 3,
        "num_workers": 0,
        "train": {**READER, "init_args": {**READER["init_args"], "split": "train"}},
        "val": {**READER, "init_args": {**READER["init_args"], "split": "validation"}},
    },
}
CACHING = (
    f"--reader={READER['class_path']}",
    "--reader.source=pairs",
    "--reader.split=train",
    "--encoder=PipelineEncoders",
    "--encoder.source=bases/sd35",
    "--encoder.text=true",
    "--encoder.t5_length=0",
    "--images.size=16",
    "--images_per_shard=16",
    "--num_workers=0",
    "--device=cpu",
)
SETTINGS: dict[str, dict[str, Any]] = {
    "lrm": {
        "model": {
            "class_path": "latentreward.reward.LRMModule",
            "init_args": {
                "backbone": {"class_path": "sd15", "init_args": {"source": "bases/sd15"}},
                "head": {"class_path": "CLIPProjectionHead", "init_args": {"guidance": 7.5}},
                "loss": {"class_path": "LRMLoss"},
                "optimizer": OPTIMIZER,
                "eval_timesteps": [1, 801],
            },
        },
        "data": PAIRS,
        "trainer": {**TRAINER, "default_root_dir": "lrm"},
    },
    "dina": {
        "model": {
            "class_path": "latentreward.reward.DiNaLRMModule",
            "init_args": {
                "backbone": {
                    "class_path": "sd35_medium",
                    "init_args": {
                        "source": "bases/sd35",
                        "visual_taps": [1],
                        "text_taps": [1],
                        "t5_length": 0,
                        "tuning": "lora",
                        "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.1},
                    },
                },
                "head": {"class_path": "GatedQFormerHead", "init_args": {"num_heads": 2}},
                "loss": {"class_path": "ThurstoneLoss"},
                "optimizer": OPTIMIZER,
                "eval_sigmas": [0.2, 0.8],
                "ensemble_sigmas": [0.2, 0.8],
            },
        },
        "data": {
            "class_path": "latentreward.diffusion.CachedPreferenceDataModule",
            "init_args": {"train": {"cache": "cache"}, "batch_size": 3, "num_workers": 0},
        },
        "trainer": {**TRAINER, "default_root_dir": "dina", "callbacks": [*TRAINER["callbacks"], AVERAGE]},
    },
    "lpo": {
        "model": {
            "class_path": "latentreward.alignment.LPOModule",
            "init_args": {
                "policy": {"source": "bases/sd15", "lora": {"rank": 2, "alpha": 4.0}},
                "reward": {"class_path": "LatentReward", "init_args": {"path": "lrm"}},
                "sampling": {"num_inference_steps": 3, "eta": 1.0},
                "candidates": {"num_candidates": 3},
                "selection": {"class_path": "QuantileThreshold", "init_args": {"quantile": 0.1}},
                "guidance_scale": 2.0,
                "optimizer": OPTIMIZER,
            },
        },
        "data": {
            "class_path": "latentreward.data.PromptDataModule",
            "init_args": {
                "prompts": "prompts.txt",
                "batch_size": 2,
                "prompts_per_rollout": 2,
                "batches_per_epoch": 4,
            },
        },
        "trainer": {
            **TRAINER,
            "default_root_dir": "lpo",
            "limit_val_batches": None,
            "callbacks": [*TRAINER["callbacks"], {"class_path": "latentreward.callbacks.PolicyLoRA"}],
        },
    },
}


def write_bases(folder: Path) -> None:
    """Write two pipelines, smaller still than the shipped ones."""
    torch.manual_seed(0)
    tokenizer = tiny_pipelines.clip_tokenizer()
    small = {"block_out_channels": (8, 8), "layers_per_block": 1}
    unet = tiny_pipelines.sd_unet(
        **small,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    sd15 = StableDiffusionPipeline(
        vae=tiny_pipelines.vae(0.18215),
        text_encoder=CLIPTextModel(tiny_pipelines.clip_config(tokenizer, layers=1)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    encoder = tiny_pipelines.clip_config(tokenizer, layers=1)
    sd35 = StableDiffusion3Pipeline(
        vae=tiny_pipelines.vae(1.5305, shift_factor=0.0609),
        transformer=tiny_pipelines.sd3_transformer(sd35=True, num_layers=2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=CLIPTextModelWithProjection(encoder),
        text_encoder_2=CLIPTextModelWithProjection(encoder),
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
    )
    for name, pipeline in (("sd15", sd15), ("sd35", sd35)):
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                tiny_pipelines.randomise(part)
        pipeline.save_pretrained(folder / name)


def write_images(folder: Path) -> None:
    """Write four pictures without loss, and the list that has each with every prompt."""
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (16 + 4 * (number % 2), 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = [{"image": f"{number}.png", "prompt": prompt} for number in range(4) for prompt in PROMPTS]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def scores_of(model: str, base: str | None = None) -> list[float]:
    """Scores of the pictures by a model of :data:`MODELS` in the current folder."""
    rows = [json.loads(line) for line in Path("images", "list.jsonl").read_text().splitlines()]
    images = [Path("images", row["image"]) for row in rows]
    reward = RewardModel.from_pretrained(model, base=base)
    return reward.score([row["prompt"] for row in rows], images, noise=MODELS[model], batch_size=2).tolist()


def make() -> None:
    """Fill the current folder."""
    write_bases(Path("bases"))
    write_images(Path("images"))
    write_pickapic("pairs", {"train": 14, "validation": 4})
    Path("pairs", "oracle.parquet").unlink()
    Path("prompts.txt").write_text("\n".join(PROMPTS[:3]) + "\n")
    latentreward(["cache", "cache", *CACHING])
    for name, settings in SETTINGS.items():
        Path(f"{name}.yaml").write_text(json.dumps(settings))
        latentreward(["fit", f"--config={name}.yaml", *QUIET])
        Path(f"{name}.yaml").unlink()
    for name in ("lrm", "dina"):
        reference = ("--reference.images=images/list.jsonl", "--licence=apache-2.0")
        latentreward(["publish", name, f"{name}_published", *reference])
    for log in Path().rglob("events.out.tfevents.*"):
        log.unlink()  # their names hold the host's
    # A published folder need not hold their paths.
    bases = {"lrm_published": "bases/sd15", "dina_published": "bases/sd35"}
    scores = {name: scores_of(name, bases.get(name)) for name in MODELS}
    Path("scores.json").write_text(json.dumps(scores, indent=1) + "\n")
