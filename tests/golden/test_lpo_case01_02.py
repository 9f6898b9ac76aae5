"""LRM on U-Nets in the published layout: features, embeddings and scores of every recorded variant."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from latentreward.core.contracts import Conditioning, Features
from latentreward.reward import PublishedSettings, RewardModel, ScoringNoise
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_close
from tests.reward.scoring.models import load_lrm

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
HALF_TOLERANCE = {"rtol": 0.0, "atol": 0.05}
MULTI_SCALE = {"": "plain", "mscfg": "enhanced", "single": "single"}
CHECKPOINT_FOLDERS = ("unet", "text_encoder", "text_encoder_2")
every_case = pytest.mark.parametrize("case", [*cases("lpo/01"), *cases("lpo/02")], ids=lambda case: case.name)


class Variant(NamedTuple):
    """A recorded setting, such as ``gs7.5_single``."""

    name: str
    guidance: float
    multi_scale: str

    @classmethod
    def parse(cls, name: str) -> "Variant":
        guidance, _, suffix = name.removeprefix("gs").partition("_")
        return cls(name, float(guidance), MULTI_SCALE[suffix])


def variants_of(data: Tensors) -> dict[str, list[str]]:
    """Variant → the batches it was recorded for."""
    found: dict[str, list[str]] = {}
    for name in data:
        if match := re.match(r"(.+?)\.(gs\d+(?:\.\d+)?(?:_[a-z]+)?)\.", name):
            batches = found.setdefault(match[2], [])
            if match[1] not in batches:
                batches.append(match[1])
    return found


def checkpoint_of(case: Case) -> Path:
    for folder in CHECKPOINT_FOLDERS:
        case.folder(f"checkpoint/{folder}")
    case.file("checkpoint/state_dict.pt")
    return case.path.parent / "checkpoint"


def model_of(case: Case, variant: Variant, folder: Path) -> RewardModel:
    """The published checkpoint as it is; the projection of ``single`` is recorded beside it and put in its place.

    ``plain`` and ``single`` are told by the file itself.
    """
    checkpoint = checkpoint_of(case)
    if variant.multi_scale == "single":
        state = torch.load(checkpoint / "state_dict.pt", weights_only=True)
        state["visual_projection"]["weight"] = case.tensors()["visual_projection_single_scale"]
        checkpoint = with_state(checkpoint, state, folder / variant.name)
    multi_scale = "enhanced" if variant.multi_scale == "enhanced" else None
    published = PublishedSettings(guidance=variant.guidance, multi_scale=multi_scale)
    model = RewardModel.from_pretrained(checkpoint, published=published)
    assert model.published == {"guidance": variant.guidance, "multi_scale": variant.multi_scale}
    return model


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case, Variant], RewardModel]:
    """Function that loads the model of a variant once; tests do not change it."""
    folder, models = tmp_path_factory.mktemp("checkpoints"), dict[tuple[str, Variant], RewardModel]()

    def load(case: Case, variant: Variant) -> RewardModel:
        if (case.name, variant) not in models:
            models[case.name, variant] = model_of(case, variant, folder / case.name)
        return models[case.name, variant]

    return load


def with_state(checkpoint: Path, state: dict, folder: Path) -> Path:
    """A copy of ``checkpoint`` with another ``state_dict.pt``."""
    shutil.copytree(checkpoint, folder, copy_function=shutil.copyfile)
    (folder / "state_dict.pt").unlink()
    torch.save(state, folder / "state_dict.pt")
    return folder


def encode(model: RewardModel, data: Tensors, prefix: str) -> Conditioning:
    """Prompts of a batch from their recorded token ids: one tensor, or one for each text encoder."""
    second = f"{prefix}input_ids_2"
    return model.backbone.text_encoder.encode_ids(
        data[f"{prefix}input_ids"], *([data[second]] if second in data else [])
    )


def ids_prefix(data: Tensors, batch: str) -> str:
    """Batches of candidates at several timesteps share the token ids of the part before ``_t``."""
    own = f"{batch}."
    return own if f"{own}input_ids" in data else f"{batch.rpartition('_t')[0]}."


def read(model: RewardModel, data: Tensors, batch: str) -> Features:
    conditioning = encode(model, data, ids_prefix(data, batch))
    uncond = encode(model, data, "neg_") if model.head.needs_uncond else None
    latents, prompts = data[f"{batch}.latents"], len(conditioning.prompt_embeds)
    conditioning = conditioning.select([*range(prompts)] * (len(latents) // prompts))
    return model.backbone(latents, data[f"{batch}.timesteps"], conditioning, uncond)


def pooled_names(features: Features) -> dict[str, Tensor]:
    """Means over the tokens by their recorded names: levels, then mid; conditional, then unconditional."""
    named = {}
    for half, side in ((features, "cond"), (features.uncond, "uncond")):
        if half is not None:
            levels = [f"pooled_down{i}" for i in range(len(half.visual) - 1)]
            for level, tokens in zip([*levels, "pooled_mid"], half.visual, strict=True):
                named[f"{level}_{side}"] = tokens.mean(dim=1)
    return named


@every_case
@torch.no_grad()
def test_every_batch_and_variant(case: Case, shared: Callable[[Case, Variant], RewardModel]) -> None:
    data = case.tensors()
    for name, batches in variants_of(data).items():
        model = shared(case, Variant.parse(name))
        for batch in batches:
            features = read(model, data, batch)
            visual_input = model.head.visual_input(features)
            image_features, text_features = model.head.embed(features)
            prompts = len(data[f"{batch}.text_features"])
            assert_close(text_features[:prompts], data[f"{batch}.text_features"], f"{batch}.text", **TOLERANCE)
            found = pooled_names(features) | {
                "visual_input": visual_input,
                "mid_enhanced": visual_input[:, -features.visual[-1].shape[-1] :],
                "image_features": image_features,
                "score": model.head(features),
            }
            for quantity in data.below(f"{batch}.{name}."):
                if quantity != "score_fp16":
                    key = f"{batch}.{name}.{quantity}"
                    assert_close(found[quantity], data[key], key, **TOLERANCE)


@every_case
def test_scores_of_latents_by_timestep(case: Case, shared: Callable[[Case, Variant], RewardModel]) -> None:
    """What was recorded is noisy already; of latents that much larger, with noise 0, the noise process makes it."""
    data = case.tensors()
    for name, batches in variants_of(data).items():
        model = shared(case, Variant.parse(name))
        uncond = encode(model, data, "neg_") if model.head.needs_uncond else None
        for batch in batches:
            key = f"{batch}.{name}.score"
            if key not in data:
                continue
            noisy, timesteps = data[f"{batch}.latents"], data[f"{batch}.timesteps"]
            conditioning = encode(model, data, ids_prefix(data, batch))
            prompts = len(conditioning.prompt_embeds)
            for row, timestep in enumerate(timesteps.expand(len(noisy)).tolist()):
                signal = (1 - model.backbone.noise_process.sigma(torch.tensor([timestep])) ** 2).sqrt()
                score = model.score_latents(
                    "",
                    noisy[[row]] / signal,
                    noise=ScoringNoise(timesteps=(timestep,)),
                    draws=torch.zeros_like(noisy[[row]]),
                    conditioning=(conditioning.select([row % prompts]), uncond),
                )
                assert_close(score, data[key][[row]], f"{key}[{row}]", **TOLERANCE)


@every_case
@torch.no_grad()
def test_half_precision_scores(case: Case, tmp_path: Path) -> None:
    data = case.tensors()
    for key in (key for key in data if key.endswith(".score_fp16")):
        batch, _, name = key.removesuffix(".score_fp16").partition(".")
        model = model_of(case, Variant.parse(name), tmp_path)
        for part in model.children():  # the whole model refuses to be cast
            part.half()
        assert_close(model.head(read(model, data, batch)), data[key], key, **HALF_TOLERANCE)


@every_case
@torch.no_grad()
def test_temperature_as_number_or_tensor(case: Case, tmp_path: Path) -> None:
    data = case.tensors()
    state = torch.load(case.file("state_dict_logit_scale_tensor.pt"), weights_only=True)
    assert isinstance(state["logit_scale"], Tensor)
    batch, variant = next((b, name) for name, batches in variants_of(data).items() for b in batches if b != "pair")
    variant = Variant.parse(variant)
    folder = with_state(checkpoint_of(case), state, tmp_path / "tensor")
    of_tensor = load_lrm(folder, guidance=variant.guidance, multi_scale=variant.multi_scale)
    of_number = model_of(case, variant, tmp_path)
    assert of_number.head.logit_scale.item() == pytest.approx(case.options["logit_scale"])
    assert torch.equal(of_tensor.head(read(of_tensor, data, batch)), of_number.head(read(of_number, data, batch)))


@every_case
@torch.no_grad()
def test_prompts(case: Case, tmp_path: Path) -> None:
    data = case.tensors()
    model = load_lrm(checkpoint_of(case))
    empty = encode(model, data, "neg_")
    embeds = encode(model, data, "distinct.").prompt_embeds
    assert_close(embeds, data["distinct.encoder_hidden_states_cond"], "encoder_hidden_states_cond", **TOLERANCE)
    assert_close(empty.prompt_embeds, data["neg_encoder_hidden_states"], "neg_encoder_hidden_states", **TOLERANCE)
    if "neg_pooled_text_embeds" in data:
        pooled = empty.pooled_prompt_embeds
        assert_close(pooled, data["neg_pooled_text_embeds"], "neg_pooled_text_embeds", **TOLERANCE)


@every_case
def test_candidates_of_a_prompt_share_its_ids(case: Case) -> None:
    data = case.tensors()
    for name in data:
        if name.endswith(".prompt_input_ids"):
            ids = data[name]
            assert torch.equal(data[name.replace("prompt_", "")], ids.repeat(case.options["K"], 1))


@pytest.mark.parametrize("case", cases("lpo/02"), ids=lambda case: case.name)
@torch.no_grad()
def test_size_conditioning(case: Case) -> None:
    data, model = case.tensors(), load_lrm(checkpoint_of(case), guidance=1.0)
    seen: list[Tensor] = []
    model.backbone.unet.add_time_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    read(model, data, "distinct")
    for row in seen[0].reshape(-1, len(data["time_ids"])):
        assert_close(row, data["time_ids"], "time_ids")
    assert data["time_ids"].tolist() == case.options["time_ids"]
