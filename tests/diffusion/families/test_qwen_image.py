"""Facts of Qwen-Image that sampling small images does not show: refusals, levels, the template, what is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from latentreward.alignment import PolicySource
from latentreward.core.contracts import Conditioning
from latentreward.diffusion.families.qwen_image import (
    TEMPLATE,
    prefix_length,
)
from tests.diffusion.families.made_qwen_image import tokenizer
from tests.diffusion.families.twins import PROMPTS, TWINS, noise_for


def test_the_templates_prefix_is_counted_with_the_tokenizer() -> None:
    words, plain = tokenizer(), tokenizer(words=False)
    pipeline = TWINS["qwen_image"].pipeline()
    assert pipeline.prompt_template_encode == TEMPLATE
    assert prefix_length(words) == 34 == pipeline.prompt_template_encode_start_idx
    assert prefix_length(plain) == len(plain(TEMPLATE.split("{}")[0]).input_ids) > 34


def test_a_prompt_has_at_most_512_tokens_and_states_that_later_ones_do_not_change() -> None:
    twin = TWINS["qwen_image"]
    pipeline, encoder = twin.pipeline(), twin.source().load().text_encoder
    assert encoder is not None
    prompts = ["x" * 700, "a cat"]
    with torch.no_grad():
        want, mask = pipeline.encode_prompt(prompts, max_sequence_length=512)
        found = encoder(prompts)
    assert found.prompt_embeds.shape[1] == encoder.num_tokens == 512
    assert torch.equal(found.prompt_mask, mask.bool())
    torch.testing.assert_close(found.prompt_embeds, want, rtol=0, atol=1e-6)
    assert not found.prompt_embeds[1, mask[1] == 0].any()


@pytest.mark.parametrize("form", ["nested", "flat", "both"])
def test_the_text_encoders_config_is_read_in_each_published_form(form: str, tmp_path: Path) -> None:
    """Published files have the language model's 128000 positions in ``text_config``, beside it, or in both places."""
    folder = Path(shutil.copytree(TWINS["qwen_image"].folder, tmp_path / "pipeline"))
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"] if form != "flat" else config.pop("text_config")
    own = ("architectures", "dtype", "model_type")
    path.write_text(json.dumps(config if form == "nested" else {**text, **{key: config[key] for key in own}, **config}))
    assert (form != "nested") == (json.loads(path.read_text()).get("max_position_embeddings") == 128000)
    encoder = PolicySource(str(folder)).load().text_encoder
    want = TWINS["qwen_image"].source().load().text_encoder
    assert encoder is not None and want is not None
    assert torch.equal(encoder(PROMPTS).prompt_embeds, want(PROMPTS).prompt_embeds)


def test_guidance_keeps_the_norm_of_each_token() -> None:
    family = TWINS["qwen_image"].source().resolve_family()
    prompt, without = (noise_for((16, 2, 4, 6), 2, seed) for seed in (0, 1))
    guided = family.guide(prompt, without, 4.0)
    tokens, wanted, plain = (family.pack(values) for values in (guided, prompt, without + 4.0 * (prompt - without)))
    torch.testing.assert_close(tokens.norm(dim=-1), wanted.norm(dim=-1))
    torch.testing.assert_close(tokens, plain * (wanted.norm(dim=-1) / plain.norm(dim=-1)).unsqueeze(-1))
    grid = family.token_grid(prompt)
    assert grid == (2, 2, 3)
    assert torch.equal(family.unpack(family.pack(prompt), grid), prompt)


def test_a_mask_that_is_true_everywhere_is_left_out() -> None:
    policy = TWINS["qwen_image"].source().load()
    seen = []
    policy.network.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["encoder_hidden_states_mask"]), with_kwargs=True
    )
    latents, at = noise_for((16, 1, 4, 6)), torch.tensor([300.0, 800.0])
    with torch.no_grad():
        policy.predict(latents, at, policy.encode_prompts(["a cat", "a dog"]))
        mixed: Conditioning = policy.encode_prompts(PROMPTS)
        policy.predict(latents, at, mixed)
    assert seen[0] is None
    assert torch.equal(seen[1], mixed.prompt_mask)


def test_a_step_can_train_after_a_validation_under_inference_mode() -> None:
    """The network keeps its positions on the device of the first call: on a CPU they are not copied, on meta they are.

    A copy made under inference mode could not be saved for a backward pass.
    """
    policy = TWINS["qwen_image"].source().load()
    with torch.no_grad():
        prompts = policy.encode_prompts(PROMPTS).to("meta")
    network = policy.network.to("meta").train()
    latents, at = noise_for((16, 1, 4, 6)).to("meta"), torch.tensor([300.0, 800.0], device="meta")
    with torch.inference_mode():
        policy.predict(latents, at, prompts)
    policy.predict(latents, at, prompts).sum().backward()
    assert all(weight.grad is not None for weight in network.parameters() if weight.requires_grad)
