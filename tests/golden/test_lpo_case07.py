"""SPO's pixel path: predicted clean latents, preprocessing of decoded pixels, the score, and the scorer's loss."""

from types import SimpleNamespace

import pytest
import torch

from latentreward.alignment import DDIMSampler
from latentreward.core.contracts import CrossScores, PairScores
from latentreward.diffusion import process_from_scheduler
from latentreward.reward import LRMLoss
from latentreward.reward.scorers.step_aware import StepAwareCLIP, prepare_pixels
from tests.golden.catalogue import Case, cases
from tests.golden.closeness import assert_close

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
every_case = pytest.mark.parametrize("case", cases("lpo/07"), ids=lambda case: case.name)


def schedule(**changes: object) -> dict[str, object]:
    assert all(case.options["scheduler_config"] == "same as case05" for case in cases("lpo/07"))
    return {"_class_name": "DDIMScheduler", **cases("lpo/05")[0].options["scheduler_config"], **changes}


@every_case
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_predicted_clean_latents(case: Case, kind: str) -> None:
    data, config = case.tensors(), schedule(prediction_type=kind)
    for timestep in {name.split(".")[0] for name in data.below(f"x0.{kind}.")}:
        sample, output = (data[f"x0.{kind}.{timestep}.{name}"] for name in ("sample", "model_output"))
        timesteps = torch.full((len(sample),), int(timestep[1:]))
        for process in (process_from_scheduler(config), DDIMSampler(config, 20)):
            found = process.clean(sample, output, timesteps)
            assert_close(found, data[f"x0.{kind}.{timestep}.pred_original_sample"], f"{kind} {timestep}", **TOLERANCE)


@every_case
def test_training_of_the_scorer_predicts_at_any_timestep(case: Case) -> None:
    data, steps = case.tensors(), case.options["spm_train_num_inference_steps"]
    sample, output, timesteps = (data[f"spm_train.{name}"] for name in ("sample", "model_output", "timesteps"))
    clean, before = data["spm_train.pred_original_sample"], data["spm_train.prev_sample"]
    found = process_from_scheduler(schedule()).clean(sample, output, timesteps)
    assert_close(found, clean, "noise process", **TOLERANCE)
    sampler = DDIMSampler(schedule(steps_offset=0), steps, eta=0.0)  # with the offset, the first would be 1000 of 999
    assert_close(sampler.clean(sample, output, timesteps), clean, "sampler", **TOLERANCE)
    assert_close(sampler.transition(sample, output, timesteps).mean, before, "previous state", **TOLERANCE)


@every_case
def test_pixels(case: Case) -> None:
    data, options = case.tensors(), case.options
    mean, std = torch.tensor(options["image_mean"]), torch.tensor(options["image_std"])
    for name in ("square", "wide"):
        found = prepare_pixels(data[f"pixels.{name}.image"], options["img_size"], mean, std)
        assert_close(found, data[f"pixels.{name}.pixel_values"], name, **TOLERANCE)


@every_case
def test_scores(case: Case) -> None:
    data = case.tensors()
    images, texts = (data[f"score.{side}_embeds"] for side in ("image", "text"))
    unit = [torch.nn.functional.normalize(embeds, dim=-1) for embeds in (images, texts)]
    network = SimpleNamespace(clip=SimpleNamespace(logit_scale=torch.tensor(case.options["logit_scale"])))
    assert_close(StepAwareCLIP.similarity(network, *unit), data["score.scores"], "scores", **TOLERANCE)


@every_case
@pytest.mark.parametrize(("mode", "negatives"), [("pair", False), ("batch", True)])
def test_loss(case: Case, mode: str, negatives: bool) -> None:
    data = case.tensors()
    image_0, image_1, text = (data[f"crit.{side}_features"] for side in ("image_0", "image_1", "text"))
    scale = torch.tensor(case.options["crit_logit_scale_log"]).exp()
    cross = CrossScores(scale * text @ image_0.T, scale * text @ image_1.T)
    weight, zeros = 1 / data["crit.num_example_per_prompt"].float(), torch.zeros(len(text))
    scores = PairScores(
        cross.chosen.diagonal(), cross.rejected.diagonal(), data["crit.label_0"], weight, zeros, zeros, cross
    )
    expected = data[f"crit.loss_in_batch_negatives_{negatives}"]
    assert_close(LRMLoss(mode)(scores), expected, mode, **TOLERANCE)
