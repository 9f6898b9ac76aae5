"""Qwen-Image-Edit: text states with pictures, whole sampling, refusals, against diffusers' pipelines."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

from latentreward.alignment import Policy, PolicySource, Sampling, TrainedLoRA, sample_latents
from latentreward.core.contracts import EditPrompt, ImageRef, PromptBatch, seen_as
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.data import ImageError, JSONLPairReader, PairDataset, PixelLoader, decode_image
from latentreward.data.image_sizes import OneSize
from latentreward.data.images import png
from latentreward.diffusion import LoRA
from latentreward.diffusion.encoders import vae
from latentreward.diffusion.families import qwen_image_edit as edit
from latentreward.reward import GatedQFormerHead, RewardModel
from tests.alignment.policies.alignment import perturbed
from tests.data.rotated import photograph
from tests.diffusion.families.made_qwen_image_edit import PAD, picture, qwen_image_edit, write
from tests.diffusion.families.test_parity import assert_near
from tests.diffusion.families.twin_qwen_image import packed, unpacked
from tests.diffusion.families.twins import GivenNoise, noise_for

SIZES = ((72, 50), (40, 60), (64, 64))
SHRINK = 256  # factor by which areas are smaller in tests that encode or sample
HEIGHT, WIDTH, STEPS = 32, 48, 3
PROMPTS = ("make it red", "put a large dog {there}, to the left of the house")
FORMS = {"single": (False, 1), "plus": (True, 1), "several": (True, 3)}
forms = pytest.mark.parametrize("form", FORMS)


def edits(count: int, prompts: tuple[str, ...] = PROMPTS, same: bool = False) -> tuple[EditPrompt, ...]:
    """Prompts with pictures of unlike sizes; ``same`` sizes for all prompts."""
    found = []
    for row, prompt in enumerate(prompts):
        sizes = [SIZES[(place + row * (not same)) % 3] for place in range(count)]
        refs = [
            ImageRef(f"{row}-{place}", png(picture(*size, seed=10 * row + place))) for place, size in enumerate(sizes)
        ]
        found.append(EditPrompt(prompt, refs))
    return tuple(found)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("edit")
    made = {"single": qwen_image_edit(plus=False), "plus": qwen_image_edit(), "zero": qwen_image_edit(zero_cond_t=True)}
    return {name: write(pipeline, root / name) for name, pipeline in made.items()}


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pipelines and the family resize pictures to areas that a test can encode."""
    module: ModuleType
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        plain = module.calculate_dimensions  # type: ignore[attr-defined]

        def shrunk(area: float, ratio: float, plain: Any = plain) -> tuple[int, ...]:
            return plain(area / SHRINK, ratio)[:2]

        def shrunk_of_three(area: float, ratio: float, plain: Any = plain) -> tuple[Any, ...]:
            return (*plain(area / SHRINK, ratio)[:2], None)

        single = module is pipeline_qwenimage_edit
        monkeypatch.setattr(module, "calculate_dimensions", shrunk_of_three if single else shrunk)
    for name in ("AREA", "SEEN_AREA"):
        monkeypatch.setattr(edit, name, getattr(edit, name) / SHRINK)


def policy_of(folder: str) -> Policy:
    return PolicySource(folder, lora=LoRA(2, 4.0), source_size="pipeline").load().eval()


def decoded(prompt: EditPrompt) -> list[Any]:
    return [decode_image(source) for source in prompt.sources]


@pytest.mark.slow
@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("form", [*FORMS, "zero"])
@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_sampling_is_the_pipelines(form: str, scale: float, folders: dict[str, str], tmp_path: Path) -> None:
    """Prompts of one batch, each with an empty prompt of its own, equal single runs of the pipeline with the LoRA."""
    plus, count = FORMS.get(form, (True, 2))
    network = {"zero_cond_t": True} if form == "zero" else {}
    pipeline: Any = qwen_image_edit(plus, **network)
    policy = perturbed(policy_of(folders["zero" if form == "zero" else "plus" if plus else "single"]))
    file = TrainedLoRA.of_policy(policy).write_diffusers(tmp_path)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    prompts = edits(count, same=True)
    noise = noise_for(policy.latent_shape(HEIGHT, WIDTH))
    sampling = Sampling(STEPS, noise_level=0.0, height=HEIGHT, width=WIDTH)
    found = sample_latents(policy, PromptBatch(prompts, ("a", "b")), sampling, scale, 0, draws=GivenNoise(noise))
    own = policy.encode_prompts(prompts), policy.encode_uncond(prompts)
    for row, prompt in enumerate(prompts):
        images = decoded(prompt)
        common = {"image": images if plus else images[0], "height": HEIGHT, "width": WIDTH, "true_cfg_scale": scale,
                  "num_inference_steps": STEPS, "output_type": "latent",
                  "latents": packed(noise[[row]], (HEIGHT, WIDTH))}  # fmt: skip
        made = pipeline(prompt=str(prompt), negative_prompt=" ", **common).images
        assert_near(found[[row]], unpacked(made, (HEIGHT, WIDTH)))
        given = [one.select([row]).trimmed() for one in own]
        made = pipeline(prompt_embeds=given[0].prompt_embeds, prompt_embeds_mask=given[0].prompt_mask,
                        negative_prompt_embeds=given[1].prompt_embeds,
                        negative_prompt_embeds_mask=given[1].prompt_mask, **common).images  # fmt: skip
        assert_near(found[[row]], unpacked(made, (HEIGHT, WIDTH)))


def test_numbers_of_tokens_at_full_size(folders: dict[str, str]) -> None:
    sizes = {(384, 384): 196, (480, 320): 187}
    encoder = PolicySource(folders["plus"]).resolve_family().load_prompt_encoder()
    empty = encoder.count_tokens([""])[0]
    assert empty == 5
    label = len(encoder.tokenizer("Picture 1: ").input_ids) + 2
    for size, number in sizes.items():
        prompt = EditPrompt("", [ImageRef("x", png(picture(*size)))])
        assert encoder.count_tokens([prompt])[0] - empty - label == number
    single = PolicySource(folders["single"]).resolve_family().load_prompt_encoder()
    prompt = EditPrompt("", [ImageRef("x", png(picture(32, 32)))])
    assert single.count_tokens([prompt])[0] - empty - 2 == 1369
    assert single.count_tokens([""]) == [empty + 3]


def test_prompts_are_checked_without_weights_and_in_other_processes(folders: dict[str, str]) -> None:
    plus, single = (PolicySource(folders[name]).resolve_family() for name in ("plus", "single"))
    check, sources = pickle.loads(pickle.dumps(plus.check_prompt)), edits(1)[0].sources
    narrow = EditPrompt("make it red", [ImageRef("long", png(picture(2, 500)))])
    for prompt in ("draw <|image_pad|>", EditPrompt("draw <|vision_start|><|vision_end|>", sources)):
        check(prompt)
    for prompt in (narrow, EditPrompt(f"draw {PAD}", sources), EditPrompt("", sources * 9)):
        with pytest.raises(InputError):
            check(prompt)
    single.check_prompt(EditPrompt("x " * 2000, sources))
    with pytest.raises(InputError, match=r"^data\.prompts: 'make it red': image 'long': a picture to edit has 2×500"):
        plus.check_prompts([*edits(1), narrow], "data.prompts")
    assert "encoder" not in vars(plus)


@pytest.mark.slow
@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_the_text_encoder_sees_the_picture_that_the_network_gets(
    exif: Any, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of photographs with an EXIF orientation, and over the default limit of pixels, in training and in scores."""
    photo = ImageRef("photo.jpg", photograph())
    plain = EditPrompt("make it red", [ImageRef("photo.jpg", png(decode_image(photo, exif=exif)), max_pixels=10**6)])
    (tmp_path / "photo.jpg").write_bytes(photo.data or b"")
    row = dict.fromkeys(("chosen", "rejected"), "photo.jpg") | {"prompt": str(plain), "source_images": ["photo.jpg"]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    reader = JSONLPairReader(str(tmp_path / "pairs.jsonl"), exif=exif)
    backbone = create_backbone("qwen_image_edit", source=folders["plus"], visual_taps=[1], text_taps=[2])
    model = RewardModel(backbone, GatedQFormerHead(backbone.feature_spec, num_heads=2)).eval()
    model.exif, model.image_sizes = exif, OneSize(32, 48)
    monkeypatch.setattr(vae, "MAX_PIXELS", 100)
    dataset = PairDataset(reader, PixelLoader(32, 48, max_pixels=10**6))
    dataset.check_prompt = backbone.family.check_prompt
    listed = seen_as(reader[0].prompt, max_pixels=10**6)
    memory = model.prompt_memory(4)
    memory.resize_sources(32, 48)
    with torch.no_grad():
        want = backbone.encode_prompts([plain])
        for found in (backbone.encode_prompts([dataset[0].pair.prompt]), memory.encode([listed])):
            assert torch.equal(found.prompt_embeds, want.prompt_embeds)
            assert torch.equal(found.source_latents[0], want.source_latents[0])
        other = EditPrompt("make it red", [replace(plain.sources[0], data=png(picture(48, 32)))])
        assert not torch.allclose(backbone.encode_prompts([other]).prompt_embeds, want.prompt_embeds)
    with pytest.raises(ImageError, match="too many pixels"):
        backbone.encode_prompts([reader[0].prompt])


def test_releases_are_told_apart(folders: dict[str, str]) -> None:
    zero, plus = (PolicySource(folders[name]).resolve_family() for name in ("zero", "plus"))
    assert (zero.model, plus.model) == ("Qwen-Image-Edit-2511", "Qwen-Image-Edit-2509")
    assert plus.sources == (1, None)
