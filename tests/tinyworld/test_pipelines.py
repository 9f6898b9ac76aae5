"""The shipped pipelines: plain loading, sampling, size; and that their pretraining runs."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from latentreward.tinyworld.captions import all_captions, held_out_captions
from latentreward.tinyworld.oracle import mean_verdict
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline, sample_pictures
from tests.marks import rotated_after
from tools.pretraining.tokenizer import build_tokenizer

PROMPT = "a red circle left of a blue square on a white background"


def test_every_word_is_one_token() -> None:
    tokenizer = build_tokenizer()
    lengths = {text: len(tokenizer(text).input_ids) for text in all_captions()}
    assert all(length == len(text.split()) + 2 for text, length in lengths.items())
    assert max(lengths.values()) == 14


def test_shipped_pipelines_are_small() -> None:
    files = [path for folder in PIPELINE_FOLDERS.values() for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 14e6


def test_sd_loads_by_the_plain_call() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE_FOLDERS["sd_tiny"])
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    assert pipeline(PROMPT, num_inference_steps=2).images[0].size == (32, 32)


def test_sd35_loads_by_the_plain_call() -> None:
    folder = PIPELINE_FOLDERS["sd35_tiny"]
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    assert {pipeline.transformer.dtype, pipeline.vae.dtype, pipeline.text_encoder_2.dtype} == {torch.float32}
    assert pipeline(PROMPT, num_inference_steps=2, max_sequence_length=0).images[0].size == (32, 32)


def test_sampling_is_seeded() -> None:
    pipeline = load_pipeline(PIPELINE_FOLDERS["sd35_tiny"])
    one, again, other = (sample_pictures(pipeline, [PROMPT], seed, num_inference_steps=2) for seed in (0, 0, 1))
    assert one.shape == (1, 32, 32, 3)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(1, PIPELINE_FOLDERS))
def test_pipelines_draw_what_they_are_asked_for(name: str) -> None:
    captions = held_out_captions(24, seed=1)
    pictures = sample_pictures(load_pipeline(PIPELINE_FOLDERS[name]), captions, seed=1, num_inference_steps=10)
    assert mean_verdict(captions, list(pictures))["alignment"] > 0.9
