"""A reward of an editor scores results for an instruction and the pictures that were edited."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from latentreward.apps.serving.batching import RequestError
from latentreward.apps.serving.bodies import parse_request
from latentreward.core.contracts import EditPrompt, ImageRef
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.data.image_lists import ImageList, ListedImage, read_images
from latentreward.data.images import png
from latentreward.reward import CLIPProjectionHead, RewardModel, RewardModelScorer, edit_prompt
from latentreward.reward.scoring.image_lists import ListedScoring, images_identity
from tests.apps.serving.servers import served_model
from tests.diffusion.families.made_qwen_image_edit import picture, qwen_image_edit_folder
from tests.diffusion.families.twins import TWINS
from tests.reward.scoring.models import edit_reward


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return edit_reward()


RED, BLUE = (Image.new("RGB", (60, 40), colour) for colour in ("red", "blue"))


@torch.no_grad()
def test_scores_depend_on_the_pictures_that_were_edited(model: RewardModel, tmp_path: Path) -> None:
    BLUE.save(tmp_path / "blue.png")
    pictures = RED, [RED], BLUE, [RED, BLUE], [BLUE, RED]
    prompts = ["make it red", *(edit_prompt("make it red", given) for given in pictures)]
    prompts.append(edit_prompt("make it red", tmp_path / "blue.png"))
    scores = model.score(prompts, [RED] * len(prompts), batch_size=2)
    assert scores[1] == scores[2] and scores[3].item() == pytest.approx(scores[6].item(), abs=1e-5)
    assert len({*scores[[0, 1, 3, 4, 5]].tolist()}) == 5
    again = torch.cat([model.score(prompt, RED) for prompt in prompts])
    assert torch.allclose(scores, again, atol=2e-5)


@pytest.mark.parametrize(("edits", "given", "wanted"), [(True, 0, "at least 1 pictures"), (False, 1, "0 pictures")])
def test_what_the_training_did_not_have_is_not_scored(edits: bool, given: int, wanted: str, tmp_path: Path) -> None:
    """The network takes both kinds; the record of the training tells which kind it knows."""
    trained = edit_reward()
    trained.edits = edits
    trained.head.requires_grad_(True)
    trained.save_pretrained(tmp_path / "reward")
    stored = RewardModel.from_pretrained(tmp_path / "reward", base=str(TWINS["klein_base"].folder))
    known, other = "make it red", edit_prompt("make it red", BLUE)
    if edits:
        known, other = other, known
    told = rf"^reward {tmp_path / 'reward'}: it takes {wanted} to edit, and a prompt edits {given}; give prompts"
    latents = torch.zeros(2, *stored.backbone.latent_space.shape(32, 48))
    assert stored.score(known, RED).isfinite().all()
    for score in (stored.score, RewardModelScorer(tmp_path / "reward", base=TWINS["klein_base"].folder).score):
        with pytest.raises(InputError, match=told):
            score([known, other], [RED, RED])
    with pytest.raises(InputError, match=told):
        stored.score_latents([known, other], latents)
    with pytest.raises(InputError, match=told):
        stored.score_states([known, other], latents[:, None], torch.tensor([500.0]))


@torch.no_grad()
def test_pictures_of_one_name_with_unlike_bytes_are_two_prompts(model: RewardModel) -> None:
    named = [EditPrompt("make it red", [ImageRef("0.png", data=png(colour))]) for colour in (RED, BLUE, RED)]
    assert len({*named}) == 2 and named[0] == named[2]
    scores = model.score(named, [RED] * 3)
    assert scores[0] == scores[2] != scores[1]
    memory = model.prompt_memory(8)
    memory.encode(named[:1])
    assert [prompt in memory for prompt in named] == [True, False, True]


def written_list(folder: Path) -> tuple[ListedImage, ...]:
    for name, image in (("red", RED), ("blue", BLUE)):
        image.save(folder / f"{name}.png")
    sources = (["blue.png"], [], ["blue.png", "red.png"], ["gone.png"], ["blue.png"], ["cut.png"])
    (folder / "cut.png").write_bytes((folder / "blue.png").read_bytes()[:-40])
    rows = [{"image": "red.png", "prompt": "make it red", "source_images": row} for row in sources]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_images(str(folder / "list.jsonl")).rows


@pytest.mark.slow
@torch.no_grad()
def test_lists_of_edits_are_scored_and_odd_rows_named(model: RewardModel, tmp_path: Path) -> None:
    rows = written_list(tmp_path)
    scoring = ListedScoring(model, rows, {"score": model.noise}, 2, 1)
    table = scoring.table(range(len(rows)))
    wanted = [model.score(row.prompt, tmp_path / "red.png").item() for row in (rows[0], rows[2], rows[4])]
    scores = table["score"].to_pylist()
    assert [scores[place] for place in (0, 2, 4)] == pytest.approx(wanted, abs=2e-5)
    _, none, _, problem, last, cut = table["problem"].to_pylist()
    number = "wrong number of pictures to edit (0 source_images; the model takes at least 1 in a list of edits)"
    assert (none, scores[1]) == (number, None)
    assert "missing file" in problem and "gone.png" in problem and last is None
    assert cut.startswith("image 'cut.png': truncated or damaged image (")


def test_other_sources_are_another_input(tmp_path: Path) -> None:
    first, *_, last, _ = written_list(tmp_path)
    plain = replace(first, prompt="make it red")
    others = [first, plain, replace(first, prompt=edit_prompt("make it red", tmp_path / "red.png"))]
    assert len({images_identity(ImageList("l", (row,)), False) for row in others}) == 3
    assert images_identity(ImageList("l", (first,))) == images_identity(ImageList("l", (last,)))
    before = images_identity(ImageList("l", (first,)))
    BLUE.resize((6, 4)).save(tmp_path / "blue.png")
    assert images_identity(ImageList("l", (first,))) != before


def test_a_head_gets_the_empty_prompt_that_was_read_beside_the_picture() -> None:
    backbone = create_backbone(
        "qwen_image_edit", source=qwen_image_edit_folder(), num_layers=2, visual_taps=[1], text_taps=[2]
    )
    seeing = RewardModel(backbone, CLIPProjectionHead(backbone.feature_spec, guidance=3.0)).eval()
    prompt, latents = (
        edit_prompt("make it red", picture(32, 48, 1)),
        torch.randn(1, *seeing.backbone.latent_space.shape(32, 48)),
    )
    with torch.inference_mode():
        memory = seeing.prompt_memory(4)
        memory.resize_sources(32, 48)
        encoded = memory.encode([prompt])
        expected = seeing.score_latents([prompt], latents)
        assert seeing.score_latents([prompt], latents, conditioning=(encoded, None)) == pytest.approx(
            expected, abs=1e-5
        )
    served = served_model(seeing)
    with pytest.raises(RequestError, match="/v1/score_images"):
        parse_request(b"", served.accepted)
