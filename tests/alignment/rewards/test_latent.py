"""A trained reward scores a policy's states as its own module would, wherever it lies and whatever the policy is."""

import logging
import os
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from latentreward.alignment import LatentReward, PolicySource
from latentreward.alignment.rewards.latent import convert_states
from latentreward.core.contracts import NoisyStates
from latentreward.core.errors import InputError
from latentreward.reward import RewardModel, ScoringNoise
from tests.alignment.rewards.stored import PROMPTS, scores_by, states_of, tiny_policy, write_run
from tests.marks import rotated_after, slow_after
from tests.reward.scoring.test_published import write_lrm
from tests.tiny_pipelines import LATENTS, pipeline_folder

SMALL = {"tuning": "lora", "lora": {"rank": 2, "alpha": 4.0}}
RUNS = [("lrm", "sd15", {}), ("lrm", "sdxl", SMALL), ("dina", "sd35", SMALL)]
frozen_policy = cache(tiny_policy)
"""Policies whose network no test shares."""


@pytest.mark.parametrize(
    ("method", "name", "options"), rotated_after(2, RUNS), ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("whole", slow_after(1, [False, True]))
def test_scores_are_those_of_training(method: str, name: str, options: dict, whole: bool, tmp_path: Path) -> None:
    module, policy = write_run(tmp_path, method, name, whole, **options), frozen_policy(name)
    reward = LatentReward(str(tmp_path / "reward.ckpt"), share="never").load(policy)
    states = states_of(policy)
    scores = reward(states, reward.encode_prompts(PROMPTS))
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    torch.testing.assert_close(scores, scores_by(module, states), rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(part.training for part in reward.train().modules())
    assert reward.model.backbone.vae is None


def test_the_moving_average_stands_for_the_weights(tmp_path: Path) -> None:
    module, policy = write_run(tmp_path, "lrm", "sd15", average=True), frozen_policy("sd15")
    averaged = LatentReward(str(tmp_path)).load(policy)
    states = states_of(policy)
    assert torch.equal(averaged(states, averaged.encode_prompts(PROMPTS)), scores_by(module, states))
    raw = LatentReward(str(tmp_path), average=False).load(policy)
    assert not raw.model.head.visual_projection.weight.any()


def test_the_folder_of_a_run_stands_for_its_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path, "lrm", "sd15")
    (tmp_path / "checkpoints").mkdir()
    for name in ("epoch=0.ckpt", "last.ckpt"):
        shutil.copy(tmp_path / "reward.ckpt", tmp_path / "checkpoints" / name)
    assert LatentReward(str(tmp_path)).stored.checkpoint == tmp_path / "reward.ckpt"
    (tmp_path / "reward.ckpt").unlink()
    stored = LatentReward(str(tmp_path)).stored
    assert stored.checkpoint == tmp_path / "checkpoints" / "last.ckpt"
    assert stored.config == tmp_path / "config.yaml"
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    assert LatentReward(str(tmp_path)).stored.checkpoint.name == "epoch=0.ckpt"


def test_of_several_settings_those_before_the_checkpoint_count(tmp_path: Path) -> None:
    write_run(tmp_path, "lrm", "sd15")
    later = tmp_path / "config_1.yaml"
    shutil.copy(tmp_path / "config.yaml", later)
    os.utime(tmp_path / "config.yaml", (1, 1))
    os.utime(tmp_path / "reward.ckpt", (2, 2))
    assert LatentReward(str(tmp_path)).stored.config.name == "config.yaml"
    os.utime(later, (2, 2))
    assert LatentReward(str(tmp_path)).stored.config.name == "config_1.yaml"


def test_latent_spaces_are_compared_from_configs_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "lrm", "sd15")
    base = tmp_path / "base"
    shutil.copytree(pipeline_folder("sd15"), base)
    for weights in base.rglob("*.safetensors"):
        weights.unlink()
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    settings["model"]["init_args"]["backbone"]["init_args"]["source"] = str(base)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    reward = LatentReward(str(tmp_path / "run"))
    reward.require_latents_of(PolicySource(pipeline_folder("sd21")))
    with pytest.raises(
        InputError, match=r"makes latents of the space \[.*0\.13025.*\], but the reward takes \[.*0\.18"
    ):
        reward.require_latents_of(PolicySource(pipeline_folder("sdxl")))


def test_a_heterogeneous_reward_reads_the_raw_prompt_itself(tmp_path: Path) -> None:
    module, policy = write_run(tmp_path, "lrm", "sd15"), frozen_policy("sd21")
    reward = LatentReward(str(tmp_path)).load(policy)
    encoded = reward.encode_prompts(PROMPTS)
    own, uncond = module.model.encode_prompts(PROMPTS)
    assert torch.equal(encoded.conditioning.prompt_embeds, own.prompt_embeds)
    assert torch.equal(encoded.uncond.prompt_embeds, uncond.prompt_embeds)
    assert own.prompt_embeds.shape != policy.encode_prompts(PROMPTS).prompt_embeds.shape
    states = states_of(policy)
    torch.testing.assert_close(reward(states, encoded), scores_by(module, states), rtol=0, atol=0)


@pytest.mark.slow
def test_a_reward_of_another_noise_process_sees_converted_states(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tiny world's two generators share a VAE, so that a DiNa-LRM may steer the DDPM one; a line says so."""
    module, policy = write_run(tmp_path, "dina", "sd35"), frozen_policy("sd15")
    with caplog.at_level(logging.INFO):
        reward = LatentReward(str(tmp_path)).load(policy)
    (line,) = (message for message in caplog.messages if message.startswith("reward "))
    assert str(tmp_path) in line and "policy's DDPM are rescaled to its FlowMatching" in line
    states, process = states_of(policy), reward.model.backbone.noise_process
    converted = convert_states(states.latents, states.timesteps, policy.noise_process, process)
    expected = scores_by(module, NoisyStates(*converted, states.rows))
    torch.testing.assert_close(reward(states, reward.encode_prompts(PROMPTS)), expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name", "options"), rotated_after(1, RUNS), ids=lambda value: value if isinstance(value, str) else ""
)
def test_gradients_reach_the_latents_in_batches_of_any_size(
    method: str, name: str, options: dict, tmp_path: Path
) -> None:
    module, policy = write_run(tmp_path, method, name, **options), frozen_policy(name)
    states = states_of(policy)
    latents = states.latents.clone().requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0])
    (expected,) = torch.autograd.grad(
        scores_by(module, NoisyStates(latents, states.timesteps, states.rows)), latents, upstream
    )
    for size in (None, 1, 3):
        reward = LatentReward(str(tmp_path), share="never", batch_size=size).load(policy)
        encoded = reward.encode_prompts(PROMPTS)
        scores = reward(NoisyStates(latents, states.timesteps, states.rows), encoded)
        torch.testing.assert_close(scores.detach(), reward(states, encoded), rtol=1e-5, atol=1e-5)
        latents.grad = None
        scores.backward(upstream)
        torch.testing.assert_close(latents.grad, expected, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            assert not reward(NoisyStates(latents, states.timesteps, states.rows), encoded).requires_grad


@pytest.mark.parametrize("sigmas", slow_after(1, [((0.4,),), ((0.2, 0.5, 0.7),)]))
def test_finished_latents_are_noised_and_scored_as_the_model_does(sigmas: tuple[float, ...], tmp_path: Path) -> None:
    module, policy = write_run(tmp_path, "dina", "sd35"), frozen_policy("sd35")
    latents, noise = torch.randn(2, 2, 4, LATENTS, LATENTS)
    reward = LatentReward(str(tmp_path), share="never").load(policy)
    encoded, leaf = reward.encode_prompts(PROMPTS), latents.clone().requires_grad_()
    scores = reward.score_clean(leaf, torch.arange(2), encoded, noise, sigmas)
    expected = module.model.score_latents(PROMPTS, leaf, noise=ScoringNoise(sigmas=sigmas), draws=noise)
    torch.testing.assert_close(scores, expected)
    gradients = [torch.autograd.grad(value.sum(), leaf)[0] for value in (scores, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="give noise and sigmas"):
        reward.score_clean(latents, torch.arange(2), encoded)


@pytest.mark.parametrize(("name", "named"), [("sd15", True), ("sd15", False), ("sdxl", True)])
def test_the_published_layout_of_lrm_takes_its_base_or_the_policys(name: str, named: bool, tmp_path: Path) -> None:
    expected, policy = write_lrm(tmp_path, name).eval(), frozen_policy(name)
    source = LatentReward(str(tmp_path), base=pipeline_folder(name) if named else None)
    assert not named or source.latent_space() == policy.latent_space  # else downscale 8, as published models have
    reward, states = source.load(policy), states_of(policy)
    conditioning, uncond = expected.encode_prompts(PROMPTS)
    torch.testing.assert_close(
        reward(states, reward.encode_prompts(PROMPTS)),
        expected(states.latents, states.timesteps, conditioning.select(states.rows), uncond).detach(),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", ["sd15", "sd35"])
def test_a_pipeline_in_place_of_a_reward_is_told_as_such(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline_folder(name), tmp_path / "base")
    message = r"^reward model '.*base' holds no checkpoint"
    with pytest.raises(InputError, match=message):
        LatentReward(str(folder)).latent_space()
    with pytest.raises(InputError, match=message):
        RewardModel.from_pretrained(folder)
    if name == "sd15":  # released files of LRM beside the whole base
        write_lrm(tmp_path / "lrm", name)
        shutil.copytree(tmp_path / "lrm", folder, dirs_exist_ok=True)
        assert LatentReward(str(folder)).latent_space().scaling_factor == 0.18215


RUN = "model: {class_path: %s, init_args: {%s}}"


@pytest.mark.parametrize(
    ("path", "options", "settings", "message"),
    [
        ("run", {"batch_size": 0}, None, "batch_size is 0; it must be at least 1"),
        ("none.ckpt", {}, None, r"reward model '.*none\.ckpt' does not exist"),
        ("empty", {}, None, "holds no checkpoint"),
        ("deep/in/alone.ckpt", {}, None, r"no config\.yaml lies beside .*alone\.ckpt"),
        ("run", {"config": "no.yaml"}, None, r"no\.yaml cannot be read"),
        ("run", {"base": "/none"}, None, r"model\.backbone: source='/none' does not exist"),
        ("run", {}, "model: [", "cannot be read"),
        ("run", {}, "model: {}", r"names no model\.init_args\.backbone"),
        ("run", {}, RUN % ("LPOModule", "policy: {}, reward: {}"), "is of LPOModule, which aligns a policy"),
        ("run", {}, RUN % ("LRMModule", "backbone: sd_tiny"), r"names no model\.init_args\.head"),
        (
            "run",
            {},
            RUN % ("LRMModule", "backbone: {class_path: sd_tinny}, head: CLIPProjectionHead"),
            r"model\.backbone: .*sd_tinny",
        ),
    ],
)
def test_bad_input_is_named_before_any_weight_is_loaded(
    path: str, options: dict, settings: str | None, message: str, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", "lrm", "sd15")
    (tmp_path / "empty").mkdir()
    (tmp_path / "deep" / "in").mkdir(parents=True)
    shutil.copy(tmp_path / "run" / "reward.ckpt", tmp_path / "deep" / "in" / "alone.ckpt")
    if settings is not None:
        (tmp_path / "run" / "config.yaml").write_text(settings)
    with pytest.raises(InputError, match=message) as caught:
        LatentReward(str(tmp_path / path), **options).latent_space()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    policy = frozen_policy("sd15")
    write_run(tmp_path, "lrm", "sd15")
    checkpoint = tmp_path / "reward.ckpt"
    whole = torch.load(checkpoint, weights_only=True)

    def refusal(content: object) -> str:
        torch.save(content, checkpoint)
        with pytest.raises(InputError) as caught:
            LatentReward(str(tmp_path)).load(policy)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds no weights of a reward" in refusal({"state_dict": {"policy.network.x": torch.zeros(1)}})
    assert "is not a Lightning checkpoint" in refusal([1, 2])
    state = dict(whole["state_dict"])
    del state["model.head.logit_scale"]
    assert "missing tensor logit_scale" in refusal(whole | {"state_dict": state})
    odd = whole["state_dict"] | {"model.head.logit_scale": torch.zeros(2)}
    assert "tensor logit_scale has shape (2,), expected (1,)" in refusal(whole | {"state_dict": odd})
    checkpoint.write_bytes(b"junk")
    with pytest.raises(InputError, match=r"reward\.ckpt is damaged"):
        LatentReward(str(tmp_path)).load(policy)


@pytest.mark.slow
def test_a_small_checkpoint_goes_with_no_other_base(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "dina", "sd35")
    content = torch.load(tmp_path / "run" / "reward.ckpt", weights_only=True)
    content["base"]["values"] = content["base"]["values"] * 1.5
    torch.save(content, tmp_path / "run" / "reward.ckpt")
    with pytest.raises(InputError, match="the checkpoint belongs to the base"):
        LatentReward(str(tmp_path / "run")).load(frozen_policy("sd35"))
