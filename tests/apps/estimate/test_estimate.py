"""``latentreward fit … --estimate``: what it reads, what it prints, and that it does nothing else."""

import re
from pathlib import Path

import pytest
import torch

from latentreward.apps.cli import main
from latentreward.diffusion.backbones.loading import tiny_pipeline
from latentreward.reward import Calibration, RewardModel
from tests.alignment.rewards.stored import write_run
from tests.diffusion.cache.written_caches import spec, write_cache
from tests.marks import release_after, rotated_after

CONFIGS = Path(__file__).parents[3] / "configs"
VARIABLES = (
    "SD15_PATH",
    "SDXL_PATH",
    "SD35_PATH",
    "CLIP_L_PATH",
    "PICKAPIC_ROOT",
    "MPCF_SCORES",
    "LRM_PATH",
    "PROMPTS",
)


@pytest.fixture(autouse=True)
def _nothing_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and a cache of the hub without files, no variables, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("latentreward.core.storage.hub._asked_once", lambda question: pytest.fail("asked the hub"))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def shown(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    main(["fit", *options, "--estimate"])
    return capsys.readouterr().out


@pytest.mark.rotated
@pytest.mark.slow
def test_the_peak_and_the_time_are_told_and_settings_are_found_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    steps = "--model.sampling.num_inference_steps=10"
    tiny = (
        f"--config={CONFIGS}/align/lpo_tiny.yaml",
        "--trainer.accelerator=auto",
        steps,
        "--data.prompts_per_rollout=64",
    )
    text = shown(capsys, *tiny, "--card_gb=4", "--tflops=1e-6")
    # 24 steps of 64 rows, of which 10 steps of 64 prompts with half of their pairs kept give 320 at a rollout
    flops = 24 * number(text, r"optimiser step of 1 batch, rollouts aside") + 5 * number(text, "rollout")
    (days,) = re.findall(r"^time: (\S+) days for 24 steps", text, re.MULTILINE)
    assert float(days) == pytest.approx(flops * 1e6 / 3600 / 24, rel=0.06)  # two digits are told
    assert re.search(r"^memory: 1\.\d of 4\.0 GB of GPU memory", text, re.MULTILINE)
    few = shown(capsys, *tiny, "--data.prompts_per_rollout=16")
    card = f"--card_gb={(number(text, 'peak') + number(few, 'peak')) / 2 * 1.1 + 1:.4f}"
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *tiny, "--estimate", card])
    told = capsys.readouterr()
    (remedy,) = re.findall(r"it fits with (--\S+): 1\.\d GB, time: ", told.err)
    assert f"tried {remedy}: " in told.out
    assert "memory: 1." in shown(capsys, *tiny, remedy, card)


CALLBACK = "--trainer.callbacks+=EncodeOnce"
ONE_CARD = ("sd15", "sdxl", "sd35_medium", "flux1")
FEW_STEPS = "--model.sampling.num_inference_steps=5"


def number(text: str, name: str) -> float:
    found = re.search(rf"^  {name} +(\S+)$", text, flags=re.MULTILINE)
    assert found, name
    return float(found[1])


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name", rotated_after(0, [f"{model}_{step}" for model in ONE_CARD for step in ("reward", "align")])
)
def test_recipes_of_one_card_fit_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/one_card.md: 24 GB, and at most 72 hours at 30 TFLOP/s; the reward is the one of the recipe beside it."""
    reward = f"--model.reward.config={CONFIGS}/one_card/{name.removesuffix('_align')}_reward.yaml"
    options = ("--card_gb=24", "--tflops=30", *([reward] if name.endswith("_align") else []))
    text = shown(capsys, f"--config={CONFIGS}/one_card/{name}.yaml", *options)
    (hours,) = re.findall(r"^time: (\S+) hours for ", text, re.MULTILINE)
    assert float(hours) <= 72
    assert name.endswith("_reward") or "reward.yaml, since no reward lies there." in text


@pytest.mark.rotated
@pytest.mark.slow
def test_tiny_alignment_needs_no_trained_reward(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny = (f"--config={CONFIGS}/align/lpo_tiny.yaml", "--data.batch_size=4", FEW_STEPS)
    text = shown(capsys, *tiny)
    assert "Configs of runs/lrm_tiny: configs/model/lrm_tiny.yaml." in text
    assert number(text, "rollout") > 0
    assert number(text, "peak") >= number(text, "peak in the passes of a batch") > number(text, "weights")
    assert not [*tmp_path.iterdir()]
    once = shown(capsys, *tiny, CALLBACK)
    encoders = re.search(r"^  text encoders .* (\S+)$", text, flags=re.MULTILINE)
    assert encoders is not None and "text encoders  " not in once
    start = number(once, "weights before the first step")
    assert start == pytest.approx(number(text, "weights"), abs=1e-3)
    assert number(once, "peak") == pytest.approx(max(start, number(text, "peak") - float(encoders[1])), abs=2e-3)
    assert f"EncodeOnce frees text encoders of {float(encoders[1]):.2f} GB before the first step." in once


@pytest.mark.rotated
@pytest.mark.slow
@pytest.mark.parametrize("config", release_after(1, ["lpo_tiny", "lpo_sd15"]))
def test_the_usual_reward_is_built_on_an_own_generator(
    config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The tiny pipeline in another place is of SD1.5's family, but not of its widths."""
    options = [f"--config={CONFIGS / 'align' / config}.yaml", f"--model.policy.source={tiny_pipeline('sd_tiny')}"]
    reward = tmp_path / "reward"
    text = shown(capsys, *options, f"--model.reward.path={reward}", "--data.batch_size=4", FEW_STEPS)
    assert f"Configs of {reward}: configs/model/lrm_sd15.yaml." in text
    assert "Configs of openai/clip-vit-large-patch14" not in text
    assert number(text, "weights") < 0.1


@pytest.mark.rotated
@pytest.mark.slow
def test_alignment_with_a_published_calibrated_reward(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_run(tmp_path / "run", "lrm", "sd15")
    model = RewardModel.from_pretrained(tmp_path / "run")
    model.calibration = Calibration.fit(torch.linspace(-1, 1, 50), "some images", model.noise)
    model.save_pretrained(tmp_path / "reward")
    options = [f"--config={CONFIGS / 'align' / 'lpo_tiny.yaml'}", f"--model.reward.path={tmp_path / 'reward'}"]
    with pytest.raises(SystemExit):
        main(["fit", *options, "--estimate"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "the base 'sd15' is the name of a folder of whoever published the model; give your copy" in last

    options += ["--model.reward.base=sd_tiny", "--model.sampling.height=64", "--model.sampling.width=96"]
    text = shown(capsys, *options, "--data.batch_size=4", FEW_STEPS)
    assert "Batch size per process 4, images of 64 x 96." in text
    assert f"Configs of {tmp_path / 'reward'}: its own settings." in text


@pytest.mark.parametrize(
    ("files", "trained", "kept"),
    rotated_after(0, [(["recipes/lrm_sd15.yaml"], 348.7, 30), (["align/lpo_sd15.yaml"], 0.8, 23)], release=1),
)
def test_full_size_from_configs_in_the_package(
    files: list[str], trained: float, kept: float, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, *(f"--config={CONFIGS / file}" for file in files))
    network = re.search(r"^  network +[\d.]+ +([\d.]+)", text, flags=re.MULTILINE)
    assert network is not None
    assert float(network[1]) == trained
    assert number(text, "kept for the backward pass") == pytest.approx(kept, rel=0.05)
    assert "Configs of stable-diffusion-v1-5/stable-diffusion-v1-5: configs kept in the package." in text


@pytest.mark.rotated
@pytest.mark.slow
def test_a_cache_tells_sizes_and_whether_prompts_are_encoded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = [f"--config={CONFIGS / name}.yaml" for name in ("model/dina_lrm_tiny", "data/tinyworld_cached")]
    texts = []
    for with_text in (True, False):
        settings = spec(with_text=with_text, images={"buckets": ((32, 32), (64, 32))})
        folder = write_cache(tmp_path / str(with_text), [{"image_a": 0, "image_b": 1}], [(32, 32)] * 2, spec=settings)
        cache = f"--data.train.cache={folder}"
        texts.append(shown(capsys, *options, cache, "--data.val=null", "--data.predict=null"))
    assert all("images of 64 x 32, whose batches are the cache's largest." in text for text in texts)
    first, second = (number(text, "forward pass of a batch") for text in texts)
    assert first < second
    both = [f"--data.train.cache={tmp_path / 'True'}", f"--data.val={{cache: {tmp_path / 'False'}}}"]
    assert number(shown(capsys, *options, *both, "--data.predict=null"), "forward pass of a batch") == second
    tokens = "--data.tokens_per_batch=32"  # one pair of 8 x 4 latent pixels, or two of 4 x 4
    text = shown(capsys, *options, both[0], "--data.val=null", "--data.predict=null", tokens)
    assert number(text, "forward pass of a batch") < first


@pytest.mark.slow
def test_a_reward_server_is_not_asked(capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS / "align" / "grpo_trajectory_tiny.yaml"
    reward = "{class_path: HTTPReward, init_args: {server: {url: 'http://127.0.0.1:9'}}}"
    text = shown(capsys, f"--config={config}", f"--model.reward={reward}", "--data.batch_size=4", FEW_STEPS)
    assert "Not counted: the work of the reward server http://127.0.0.1:9." in text
