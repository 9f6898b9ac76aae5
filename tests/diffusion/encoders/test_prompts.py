"""Prompt encoders against diffusers' own ``encode_prompt``."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from latentreward.core.contracts import Conditioning
from latentreward.diffusion.backbones.loading import PipelineSource
from latentreward.diffusion.encoders.prompts import equal_lengths
from tests.tiny_pipelines import TOKENS, WIDTH, pipeline_folder

PROMPTS = ["a cat", "", "two cats on a mat, and so many words that they are cut"]


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_clip_prompts_equal_diffusers(name: str) -> None:
    encoder = PipelineSource(pipeline_folder(name)).clip_prompts()
    ours = encoder(PROMPTS)
    oracle = StableDiffusionPipeline.from_pretrained(pipeline_folder(name))
    tokens, _ = oracle.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours.prompt_embeds, tokens, rtol=0, atol=0)
    ids = encoder.tokenize(PROMPTS)[0]
    ends = (ids == encoder.tokenizer.eos_token_id).int().argmax(dim=1)
    torch.testing.assert_close(ours.pooled_prompt_embeds, tokens[range(3), ends], rtol=0, atol=0)
    assert (encoder.token_dim, encoder.num_tokens) == (tokens.shape[2], TOKENS)


def test_sdxl_prompts_equal_diffusers() -> None:
    ours = PipelineSource(pipeline_folder("sdxl")).sdxl_prompts()(PROMPTS)
    oracle = StableDiffusionXLPipeline.from_pretrained(pipeline_folder("sdxl"))
    tokens, _, pooled, _ = oracle.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(ours.prompt_embeds, tokens, rtol=0, atol=0)
    torch.testing.assert_close(ours.pooled_prompt_embeds, pooled, rtol=0, atol=0)


@pytest.mark.parametrize("t5_length", [0, 10, 40])
@pytest.mark.parametrize("name", ["sd35", "sd35_no_t5"])
def test_sd3_prompts_equal_diffusers(name: str, t5_length: int) -> None:
    if t5_length == 0 and name == "sd35":
        pytest.skip("diffusers has no zero-length T5")
    encoder = PipelineSource(pipeline_folder(name)).sd3_prompts(3 * WIDTH, t5_length)
    ours = encoder(PROMPTS)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd35_no_t5" else {}
    oracle = StableDiffusion3Pipeline.from_pretrained(pipeline_folder(name), **absent)
    tokens, _, pooled, _ = oracle.encode_prompt(
        PROMPTS, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=t5_length or 5
    )
    torch.testing.assert_close(ours.prompt_embeds, tokens[:, : TOKENS + t5_length], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.pooled_prompt_embeds, pooled, rtol=0, atol=0)
    assert ours.prompt_embeds.shape[1:] == (encoder.num_tokens, encoder.token_dim)
    assert ours.pooled_prompt_embeds.shape[1] == encoder.pooled_dim


def test_load_t5_false_gives_zeros_in_its_place() -> None:
    encoder = PipelineSource(pipeline_folder("sd35")).sd3_prompts(3 * WIDTH, 10, load_t5=False)
    assert encoder.text_encoder_3 is None
    assert encoder(["a cat"]).prompt_embeds[:, TOKENS:].eq(0).all()


def test_graph_only_where_something_trains() -> None:
    encoder = PipelineSource(pipeline_folder("sd15")).clip_prompts()
    assert encoder(["a cat"]).prompt_embeds.requires_grad
    encoder.requires_grad_(False)
    assert not encoder(["a cat"]).prompt_embeds.requires_grad
    with torch.no_grad():
        encoder.requires_grad_(True)
        assert not encoder(["a cat"]).prompt_embeds.requires_grad


def test_batches_of_equal_lengths_hold_every_prompt_once_and_pad_none(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PipelineSource(pipeline_folder("sd15")).clip_prompts()
    assert equal_lengths(encoder, ["a", "b c d", ""], 2) == [[0, 1], [2]]
    monkeypatch.setattr(encoder, "count_tokens", lambda prompts: [len(prompt) for prompt in prompts])
    assert equal_lengths(encoder, ["ab", "a", "cd", "b", "ef", ""], 2) == [[5], [1, 3], [0, 2], [4]]


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [([0, 1, 2], [0, 1, 2]), ([2, 0, 0, 1], [2, 0, 0, 1]), ([0, 1], [0, 1]), ([False, True, True], [1, 2])],
)
def test_rows_are_selected_and_all_in_their_order_are_not_copied(rows: list[int], wanted: list[int]) -> None:
    prompts = Conditioning(torch.arange(6.0).view(3, 1, 2), torch.arange(3.0).view(3, 1))
    found = prompts.select(torch.tensor(rows))
    torch.testing.assert_close(found.prompt_embeds[:, 0, 0], 2.0 * torch.tensor(wanted))
    assert (found is prompts) == (rows == [0, 1, 2])
    with torch.inference_mode():
        made = Conditioning(prompts.prompt_embeds + 0)
    assert not made.select([0, 1, 2]).prompt_embeds.is_inference()
