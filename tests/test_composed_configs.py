"""Every method of configs/method on every policy of configs/policy: parsed, estimated, and two steps of a tiny twin."""

from itertools import product
from pathlib import Path

import pytest
from safetensors.torch import load_file

from latentreward.apps.cli import main
from latentreward.apps.commands.configs import FLOWS_ONLY as FLOWS
from latentreward.apps.commands.configs import NOISE_POLICIES as UNETS
from latentreward.tinyworld.writers import write_pickapic
from tests.core.settings.test_refusals import refusal
from tests.diffusion.families.made_qwen_image_edit import qwen_image_edit_folder
from tests.diffusion.families.test_every_command import write_edits
from tests.diffusion.families.twins import TWINS
from tests.marks import rotated_after
from tests.tiny_pipelines import pipeline_folder

CONFIGS = Path(__file__).parents[1] / "configs"
POLICIES = {"chroma": "chroma", "ernie_image": "ernie_image", "flux1": "flux1_dev", "flux2_klein": "klein_base",
            "hidream": "hidream", "ideogram4": "ideogram4",
            "krea2": "krea2", "lumina2": "lumina2", "qwen_image": "qwen_image", "sd15": "sd15", "sd21": "sd21",
            "sdxl": "sdxl", "sd3_medium": "sd3", "sd35_large": "sd35_large", "sd35_medium": "sd35", "wan21": "wan21",
            "z_image": "z_image", "ip2p_sd15": "ip2p_sd15", "flux1_kontext": "flux1_kontext",
            "qwen_image_edit": "qwen_image_edit"}  # fmt: skip
"""Policy → its twin."""
METHODS = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))
EDITORS = ("ip2p_sd15", "flux1_kontext", "qwen_image_edit")
"""Policies that get pictures to edit."""
EDITS = """
class_path: latentreward.data.PreferenceDataModule
init_args:
  train: {{class_path: latentreward.data.JSONLPairReader, init_args: {{file: {root}/pairs.jsonl}}}}
  size: 16
  batch_size: 2
  num_workers: 0
  shared_prompts: keep
"""
PAIRS = """
class_path: latentreward.data.PreferenceDataModule
init_args:
  train: {{class_path: latentreward.data.PickAPicReader, init_args: {{source: {root}, split: train}}}}
  size: {size}
  batch_size: 2
  num_workers: 0
"""
STEPS = {"awm": 8, "dgpo": 8, "spo": 8}
"""Method → steps of the sampler, others than 4."""
SMALL = {
    "awm": ("model.num_samples=2",),
    "nft": ("model.num_samples=2",),
    "dgpo": ("model.num_samples=2",),
    "crd": ("model.num_samples=2",),
    "ram": ("model.num_samples=2", "model.draws=2"),
    "grpo_trajectory": ("model.num_trajectories=2",),
    "grpo_stepwise": ("model.candidates.num_candidates=2",),
    "lpo": ("model.candidates.num_candidates=2",),
    "spo": ("model.candidates.num_candidates=2",),
    "refl": ("model.stop_range=[1,2]",),
    "prfl": ("model.stop_range=[2,4]",),
    "refl_state": ("model.stop_range=[2,4]",),
}
"""Method → settings that make it small."""


def cells() -> list[tuple[str, str]]:
    """All pairs; the first ones have each policy and each method at least once, and one that is refused."""
    flows_first = sorted(POLICIES, key=lambda policy: policy in UNETS)
    order = sorted(METHODS, key=lambda method: method not in FLOWS)
    first = [(policy, order[number % len(order)]) for number, policy in enumerate(flows_first)]
    return first + [cell for cell in product(POLICIES, METHODS) if cell not in first]


def twin(name: str) -> tuple[str, tuple[int, int]]:
    """Folder of a twin, and a size of pictures."""
    if name == "qwen_image_edit":
        return qwen_image_edit_folder(), (32, 48)
    return (TWINS[name].folder, TWINS[name].size) if name in TWINS else (pipeline_folder(name), (16, 16))


@pytest.fixture(autouse=True)
def _prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\ntwo dogs on a hill in the rain\n")
    monkeypatch.setenv("PROMPTS", "prompts.txt")
    for name in ("REWARD_PATH", "CACHE_ROOT", "SPM_PATH"):
        monkeypatch.setenv(name, name.lower())


def compose(capsys: pytest.CaptureFixture[str], *names: str) -> str:
    """Write run.yaml as its head comment says; its text."""
    main(["configs", "--compose", *names])
    text = capsys.readouterr().out
    Path("run.yaml").write_text(text)
    return text


def arguments(policy: str, method: str, name: str | None = None) -> list[str]:
    """The run of run.yaml with a twin, a reward that is a formula, and little of everything."""
    folder, (height, width) = twin(name or POLICIES[policy])
    options = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.strategy=auto", "trainer.precision=32-true",
               "trainer.accumulate_grad_batches=1", "trainer.max_steps=2", "trainer.callbacks=null",
               "trainer.callbacks+=PolicyLoRA", "trainer.enable_progress_bar=false",
               "trainer.enable_model_summary=false", "model.policy.frozen_dtype=float32",
               f"model.policy.source={folder}", *SMALL.get(method, ())]  # fmt: skip
    if "t5_length" in (CONFIGS / "policy" / f"{policy}.yaml").read_text():
        options.append("model.policy.t5_length=5")
    pairs = PAIRS.format(root=write_pickapic("pairs", {"train": 8}).resolve(), size=height)
    if policy in EDITORS:
        write_edits(Path("edits"))
        pairs = EDITS.format(root=Path("edits").resolve())
    if method.endswith("dpo"):
        options += [f"data={pairs}", "trainer.limit_val_batches=0"]
    else:
        reward = (
            "diffusion.families.test_methods.RednessSource"
            if method == "spo"
            else "alignment.modules.toy_rewards.BrightnessSource"
        )
        sampling = {"num_inference_steps": STEPS.get(method, 4), "height": height, "width": width}
        options += [] if method == "opd" else [f"model.reward=tests.{reward}"]
        options += [
            *(f"model.sampling.{key}={value}" for key, value in sampling.items()),
        ]
        data = "data.prompts" if method == "prfl" else "data"
        options += [f"{data}.batch_size=2", f"{data}.batches_per_epoch=4"]
        options += [f"{data}.prompts=edits/prompts.jsonl"] if policy in EDITORS else []
        options += [f"data.images={pairs}"] if method == "prfl" else []
        options += [] if method in ("prfl", "refl", "refl_state") else ["data.prompts_per_rollout=2"]
    return ["fit", "--config=run.yaml", *(f"--{option}" for option in options)]


def test_every_policy_has_a_twin() -> None:
    assert {*POLICIES} == {path.stem for path in (CONFIGS / "policy").glob("*.yaml")}


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "method"), rotated_after(6, cells(), release=len(POLICIES)))
def test_every_method_on_every_policy(policy: str, method: str, tmp_path: Path, capsys) -> None:
    given, unfit = arguments(policy, method), policy in UNETS and method in FLOWS
    if unfit:
        assert "is for flows" in refusal(capsys, "configs", "--compose", policy, method)
        given[1:2] = [f"--config=configs/{file}.yaml" for file in (f"policy/{policy}", f"method/{method}")]
    else:
        compose(capsys, policy, method)
    if unfit or (policy, method) == ("ideogram4", "opd"):  # whose teacher is the policy with guidance
        said = "no rectified flow" if unfit else "Ideogram 4 is guided by a second network"
        assert said in refusal(capsys, *given, "--estimate")
        assert said in refusal(capsys, *given)
        return
    main([*given, "--estimate"])
    assert "\n  peak  " in capsys.readouterr().out
    main(given)
    (lora,) = tmp_path.glob(f"runs/{policy}/{method}/lora/*.safetensors")
    weights = load_file(lora)
    assert any(value.any() for key, value in weights.items() if "lora_B" in key or "lora.up" in key)
