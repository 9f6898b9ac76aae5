"""generate from a file of prompts to pictures, grid and table."""

import csv
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentreward.alignment import POLICY, PolicySource, PriorNoise, PromptedPolicy, Sampling, TrainedLoRA
from latentreward.alignment.policies.checkpoint import SOURCE
from latentreward.apps.cli import main
from latentreward.apps.commands import generate as command
from latentreward.apps.generation import search
from latentreward.apps.generation.image_folder import file_name
from latentreward.core.contracts import PromptBatch
from latentreward.core.interrupts import interrupts_held
from tests.alignment.policies.alignment import perturbed
from tests.marks import rotated_after

PROMPTS = ["a large red circle on a white background", "two blue crosss on a gray background", 'a «"/\\: ü, \t|?*']
FAST = ["--policy.source=sd_tiny", "--sampling.num_inference_steps=3", "--guidance_scale=1", "--device=cpu"]
REWARD = "--reward=tests.apps.generation.toy_rewards.MeanLatentSource"
NOISY = ("--sampling.eta=1", "--reward=RandomReward")


@pytest.fixture
def generate(prompts: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    def run(*options: str, folder: str = "out", file: Path = prompts) -> list[dict[str, Any]]:
        main(["generate", str(file), str(tmp_path / folder), *FAST, *options])
        return list(csv.DictReader((tmp_path / folder / "images.csv").read_text(encoding="utf-8").splitlines()))

    return run


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))}


@pytest.mark.slow
def test_pictures_grid_and_table(generate: Callable[..., Any], tmp_path: Path) -> None:
    rows = generate("--images_per_prompt=2")
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(2)]
    found = pictures(tmp_path / "out")
    assert sorted(row["file"] for row in rows) == list(found)
    assert all(picture.shape == (32, 32, 3) for picture in found.values())
    assert Image.open(tmp_path / "out" / "grid.png").width > 64
    assert len({picture.tobytes() for picture in found.values()}) == 6


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(
    generate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate("--batch_size=2", folder="whole")
    generate("--batch_size=2", folder="out")
    (tmp_path / "out" / file_name(2, 0, PROMPTS[2])).unlink()
    asked, sample = [], search.sample_latents
    monkeypatch.setattr(search, "sample_latents", lambda *a, **o: asked.append(a[1].prompts) or sample(*a, **o))
    generate("--batch_size=2", folder="out")
    assert asked == [(PROMPTS[2],)]
    whole, resumed = pictures(tmp_path / "whole"), pictures(tmp_path / "out")
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)
    generate(folder="out")
    assert len(asked) == 1


@pytest.mark.slow
def test_ctrl_c_keeps_the_batches_that_are_done(
    generate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate("--batch_size=1", folder="whole")
    calls, add = [], command.image_folder.ImageFolder.add

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:  # in the midst of a write, which is done whole
            signal.raise_signal(signal.SIGINT)
        add(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(command.image_folder.ImageFolder, "add", interrupts_held()(interrupted))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            generate("--batch_size=1")
    assert stop.value.code == 130
    kept = f"2 pictures are kept in {tmp_path / 'out'}"
    assert capsys.readouterr().err == f"latentreward: stopped by Ctrl-C; {kept}: the same command goes on there\n"
    generate("--batch_size=1")
    assert "2 of 3 pictures are there already" in capsys.readouterr().out
    whole, resumed = pictures(tmp_path / "whole"), pictures(tmp_path / "out")
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_neither_batch_nor_later_prompts_change_a_picture(generate: Callable[..., Any], tmp_path: Path) -> None:
    generate("--batch_size=1", folder="one")
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "a small red cross on a black background"]))
    generate(folder="out")
    one, out = pictures(tmp_path / "one"), pictures(tmp_path / "out")
    assert len(out) == len(one) + 1
    assert all(np.abs(one[name].astype(int) - out[name]).max() <= 1 for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    rotated_after(
        1,
        [
            ["--best_of=4"],
            ["--step_search.num_candidates=4", "--sampling.eta=1"],
            ["--reward_guidance.scale=100", "--reward_guidance.high=1000", "--sampling.eta=1"],
        ],
    ),
)
def test_a_reward_chooses(generate: Callable[..., Any], options: list[str]) -> None:
    eta = [option for option in options if "eta" in option]
    plain = generate(REWARD, *eta, folder="plain")
    chosen = generate(REWARD, *options, folder="chosen")
    assert all(float(row["score"]) >= float(row["mean_score"]) for row in chosen)
    assert sum(float(row["score"]) for row in chosen) > sum(float(row["score"]) for row in plain)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], [REWARD, "--best_of=3"]])
def test_the_noise_of_the_table_leads_to_the_picture(
    generate: Callable[..., Any], tmp_path: Path, options: list[str]
) -> None:
    rows = generate("--policy.source=sd35_tiny", "--images_per_prompt=2", "--batch_size=4", *options)
    policy, sampling = PolicySource("sd35_tiny").load().eval(), Sampling(3)
    sampler, names = sampling.sampler(policy.family), [row["noise"] for row in rows]
    assert len({*names}) == len(rows) == 6
    with torch.no_grad():
        network = PromptedPolicy.of(policy, PromptBatch(tuple(row["prompt"] for row in rows), tuple(names)), 1.0)
        latents = torch.stack([PriorNoise.parse(name).draw() for name in names])
        for _, timestep in sampler.steps():  # Euler's, without the sampling loop of the command
            output = network(latents, timestep)
            latents = sampler.transition(latents, output, torch.full((6,), timestep)).mean
        drawn = command.image_folder.decode_latents(policy, latents)
    found = np.stack([*pictures(tmp_path / "out").values()])
    expected = ((drawn.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
    assert np.abs(found - expected).max() <= 1


@pytest.mark.slow
def test_a_checkpoint_and_its_exported_lora_make_the_same_pictures(
    generate: Callable[..., Any], tmp_path: Path
) -> None:
    source = PolicySource("sd_tiny")
    policy = perturbed(source.load())
    adapter = {f"policy.{name}": weight for name, weight in policy.named_parameters() if f".{POLICY}." in name}
    torch.save({"state_dict": adapter, SOURCE: asdict(source)}, tmp_path / "run.ckpt")
    TrainedLoRA.of_policy(policy).write_diffusers(tmp_path / "exported")
    generate(folder="base")
    generate(f"--lora={tmp_path / 'exported'}", folder="lora")
    generate(f"--checkpoint={tmp_path / 'run.ckpt'}", "--policy=null", folder="run")
    base, lora, run = (pictures(tmp_path / name) for name in ("base", "lora", "run"))
    assert all(np.abs(lora[name].astype(int) - run[name]).max() <= 1 for name in base)
    assert all(np.abs(lora[name].astype(int) - base[name]).max() > 10 for name in base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--best_of=2"], "set reward"),
        (["--step_search.num_candidates=1", REWARD], "num_candidates=1"),
        (["--step_search.num_candidates=2", REWARD], "eta"),
        (["--reward_guidance.scale=1", "--step_search.num_candidates=2", REWARD], "leave one out"),
        (["--reward_guidance.scale=1", REWARD], "none of the 3 steps adds noise"),
        (["--reward_guidance.normalise=true", *NOISY, "--reward.kind=readout"], "reward_guidance.normalise"),
        (["--reward_guidance.scale=1", *NOISY], "gradient of the reward"),
        (["--best_of=2", "--reward=RewardMixture", "--reward.normalise=running", "--reward.rewards=[RandomReward]"],
         "RewardMixture"),
        (["--guidance_scale=0.5"], "guidance_scale=0.5"),
        (["--sampling.noise_level=0.7"], "sampling.noise_level=0.7"),
        (["--policy.source=sd35_tiny", "--sampling.eta=1"], "sampling.eta=1"),
        (["--score_sigmas=[0.2,0.2]"], "score_sigmas=[0.2, 0.2]"),
        (["--policy=null"], "policy.source"),
        (["--lora=nothing.safetensors"], "nothing.safetensors"),
        (["--checkpoint=nothing.ckpt"], "nothing.ckpt"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_line(
    generate: Callable[..., Any], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        generate(*options)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert message in error
    assert error.startswith("latentreward: error: ")


@dataclass
class Judged:
    """A reward function with a secret setting."""

    key: str
    factor: float = 1.0

    def __call__(self, latents: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.factor * latents.flatten(1).mean(1)


@pytest.mark.slow
def test_settings_of_own_objects_count_and_are_not_written(
    generate: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = ["--reward=CallableReward", f"--reward.function={__name__}.Judged", "--reward.function.key=hf_secret"]
    generate(*reward)
    assert "hf_secret" not in (tmp_path / "out" / "generate.json").read_text()
    generate(*reward)
    assert "3 of 3 pictures are there already" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        generate(*reward, "--reward.function.factor=2.0")
    told = capsys.readouterr().err
    assert "was begun with reward.function" in told and "hf_secret" not in told


GENERATE = Path(__file__).resolve().parents[3] / "configs" / "generate"


@pytest.mark.parametrize("name", rotated_after(1, sorted(path.name for path in GENERATE.glob("*.yaml"))))
def test_shipped_configs_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD35_PATH", "sd35_tiny")
    monkeypatch.setenv("DINA_PATH", "unused")
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPTS[0]}\n")
    small = ["--sampling.num_inference_steps=4", "--sampling.height=null", "--sampling.width=null"]
    main(["generate", str(file), str(tmp_path / "out"), f"--config={GENERATE / name}", *small, REWARD, "--device=cpu"])
    (row,) = csv.DictReader((tmp_path / "out" / "images.csv").open())
    assert np.isfinite(float(row["score"]))
