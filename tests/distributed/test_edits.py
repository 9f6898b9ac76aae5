"""Rewards of edits under FSDP2: two processes, whose text encoders are sharded, give the weights of one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import EncodeOnce, TrainableCheckpoint
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from latentreward.alignment import LPOModule, Policy, PolicySource, Sampling
from latentreward.core.checkpoints.fsdp2 import FSDP2Strategy
from latentreward.core.contracts import EditPrompt, ImageRef, like_prompt
from latentreward.core.registry import create_backbone
from latentreward.data import LoadedPair, PixelLoader, collate_pairs
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.diffusion import LoRA
from latentreward.reward import DiNaLRMModule, ThurstoneLoss
from tests.alignment.modules.batches import dina_head, loaded_pairs
from tests.alignment.modules.simple_reward import FirstChannelReward
from tests.diffusion.families.made_qwen_image_edit import qwen_image_edit_folder
from tests.diffusion.families.twins import TWINS
from tests.distributed.ranks import on_ranks
from tests.distributed.runs import EveryNth, make_trainer, outcome, sgd
from tests.reward.scoring.models import picture, png

SOURCES = {"flux2_klein": 2, "qwen_image_edit": 1}
"""Number of pictures to edit, by backbone; the text encoder of the second sees them too."""


def folder_of(name: str) -> str:
    return qwen_image_edit_folder() if name == "qwen_image_edit" else TWINS["klein_base"].folder


def pairs_of(count: int) -> list[LoadedPair]:
    """Pairs with ``count`` of three pictures, of which ranks therefore encode unlike numbers."""
    refs = [ImageRef(f"source {number}", png(picture(number, 40, 40 + 8 * number))) for number in range(3)]
    pixels = [PixelLoader(16, 16)(ref) for ref in refs]
    found = []
    for number, item in enumerate(loaded_pairs(8)):
        places = [(number // 2 + place) % 3 for place in range(count)]
        prompt = EditPrompt(item.pair.prompt, [refs[place] for place in places])
        sources = tuple(pixels[place] for place in places)
        found.append(replace(item, pair=replace(item.pair, prompt=prompt), sources=sources))
    return found


def train(name: str, folder: Path, strategy: Any = "auto") -> dict[str, Any]:
    """Two steps on eight pairs and a validation, and what came of them."""
    source = folder_of(name)  # making it draws random numbers
    torch.manual_seed(0)
    taps = {"visual_taps": [1, 2], "text_taps": [2], "lora": LoRA(2), "gradient_checkpointing": True}
    backbone = create_backbone(name, source=source, num_layers=2, **taps)
    module = DiNaLRMModule(backbone, dina_head, ThurstoneLoss(), eval_sigmas=[0.5], optimizer=sgd, seed=0)
    trainer = make_trainer(folder, strategy)
    data = DataLoader(pairs_of(SOURCES[name]), 4 // trainer.world_size, sampler=EveryNth(8), collate_fn=collate_pairs)
    before = {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}
    trainer.fit(module, data, data)
    groups = [*module.model.backbone.text_encoder.modules()] if strategy != "auto" else []
    return {
        **outcome(module, trainer),
        "before": before,
        "sharded": all(isinstance(weight, DTensor) for weight in module.parameters()),
        "groups": sum(isinstance(group, FSDPModule) for group in groups),
    }


def train_all(folder: Path) -> dict[str, Any]:
    """On ranks: every family."""
    for name in SOURCES:
        folder_of(name)  # before there is a process group: in one, transformers leaves saving to rank 0
    return {name: train(name, folder, FSDP2Strategy()) for name in SOURCES}


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    ranks = on_ranks("tests.distributed.test_edits:train_all", tmp_path)
    for name in SOURCES:
        one = train(name, tmp_path)
        moved = [not torch.equal(value, one["before"][key]) for key, value in one["weights"].items()]
        assert sum(moved) > len(moved) // 2
        for two in (rank[name] for rank in ranks):
            assert two["sharded"] and two["groups"] > 2
            for key in ("train/loss", "val/margin"):
                assert two["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-5, abs=1e-6)
            for key, value in one["weights"].items():
                torch.testing.assert_close(two["weights"][key], value, rtol=1e-5, atol=1e-5)


def edits() -> tuple[EditPrompt, ...]:
    """Of one picture each, in batches of unlike lengths."""
    texts = "make it red", "make the dog red", "remove the small dog"
    return tuple(
        EditPrompt(text, [ImageRef(f"{number}", png(picture(number, 40, 40 + 28 * number)))])
        for number, text in enumerate(texts)
    )


def encode_once(folder: Path) -> list[Tensor]:
    """On a rank: the stored prompts, the empty ones too."""
    policy = PolicySource(folder_of("qwen_image_edit"), lora=LoRA(2))
    module = LPOModule(policy, FirstChannelReward(), sampling=Sampling(2, height=32, width=48), seed=0)
    data = PromptLoaders(edits(), batch_size=1, prompts_per_rollout=1, batches_per_epoch=1, seed=1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [TrainableCheckpoint(), EncodeOnce(str(folder))]
    Trainer(
        accelerator="cpu", devices=3, strategy=FSDP2Strategy(), max_steps=0, callbacks=callbacks, **quiet
    ).fit(module, data)  # fmt: skip
    return stored_states(module.policy)


def stored_states(policy: Policy) -> list[Tensor]:
    prompts = [like_prompt(text, edit) for edit in edits() for text in (str(edit), "", " ")]
    return [policy.encode_prompts([prompt]).prompt_embeds for prompt in prompts]


@pytest.mark.slow
def test_three_ranks_encode_prompts_whose_pictures_a_sharded_encoder_sees(tmp_path: Path) -> None:
    """Ranks that encode a text alone would leave the vision tower out, whose weights the others gather."""
    wanted = stored_states(PolicySource(folder_of("qwen_image_edit")).load())
    for found in on_ranks("tests.distributed.test_edits:encode_once", tmp_path, 3, timeout=120):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
