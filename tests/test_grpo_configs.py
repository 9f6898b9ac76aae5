"""YAML files of GRPO, NFT, AWM, RAM, DGPO and CRD parse, build at full size, and the tiny ones train under guard."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace
from safetensors.torch import load_file

from latentreward.alignment import (
    AWMModule,
    CRDModule,
    DGPOModule,
    DiffusionNFTModule,
    DiffusionOPSDModule,
    OnPolicyDistillationModule,
    RAMModule,
    StepwiseGRPOModule,
    TrajectoryGRPOModule,
)
from latentreward.apps.cli import main
from latentreward.apps.estimate.pipelines import write_pipelines
from tests.diffusion.families.twins import TWINS
from tests.marks import release_after, rotated_after
from tests.test_recipes import parse

FOLDER = Path(__file__).parents[1] / "configs" / "align"
FILES = sorted(
    path.stem
    for kind in ("awm", "crd", "dgpo", "grpo", "nft", "opd", "opsd", "ram")
    for path in FOLDER.glob(f"{kind}_*.yaml")
)
TOY = "--model.reward=tests.alignment.modules.simple_reward.FirstChannelReward"
MONITOR = (
    "    - class_path: HackingMonitor\n"
    "      init_args:\n"
    "        prompts: ${oc.env:PROMPTS}\n"
    "        every_n_steps: 2\n"
    "        action: warn\n"
    "        held_out:\n"
    "          class_path: CallableScorer\n"
    "          init_args: {function: tests.test_grpo_configs.size, name: size}\n"
)
REWARD = {"opd": (), "opsd": ("--model.reward=tests.alignment.modules.toy_rewards.BrightnessSource",)}
"""Method → its reward, others than TOY."""


@pytest.fixture(scope="module", autouse=True)
def _paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folders = write_pipelines(tmp_path_factory.mktemp("full_size"))
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red circle on a black background\ntwo blue squares on a white background\n")
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in folders.items():
            patch.setenv(f"{name.upper()}_PATH", folder)
        for name, value in {
            "PROMPTS": str(prompts),
            "LRM_PATH": "lrm",
            "DINA_PATH": "dina",
            "REWARD_PATH": "dina",
        }.items():
            patch.setenv(name, value)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(1, FILES, release=4))
def test_parses_and_keeps_its_runs_apart(name: str) -> None:
    assert parse(f"configs/align/{name}.yaml").config["fit"]["trainer"].default_root_dir == f"runs/{name}"


RUN = "configs/align/grpo_trajectory_sd35.yaml"
CHANGES = sorted(path.stem for path in (FOLDER.parent / "grpo").glob("*.yaml"))
MIXTURE = (
    '--model.reward={"class_path": "RewardMixture", "init_args": {"rewards": '
    '[{"class_path": "RandomReward", "init_args": {"kind": "readout", "seed": 1}},'
    ' {"class_path": "RandomReward", "init_args": {"kind": "readout", "seed": 2}}], "normalise": "none"}}'
)
READOUT = '--model.reward={"class_path": "RandomReward", "init_args": {"kind": "readout"}}'


@pytest.fixture(scope="module")
def plain(_paths: None) -> Namespace:
    """Settings of a run that further files change."""
    return parse(RUN).config["fit"]


@pytest.mark.parametrize("name", rotated_after(2, CHANGES))
def test_a_change_of_grpo_is_given_after_a_run(name: str, plain: Namespace) -> None:
    changed = parse(RUN, f"configs/grpo/{name}.yaml").config["fit"]
    assert changed["trainer"].default_root_dir == f"runs/grpo_{name}"
    before, after = plain["model"]["init_args"], changed["model"]["init_args"]
    assert before != after
    for setting in ("policy", "optimizer", "guidance_scale", "num_trajectories"):
        assert before[setting] == after[setting]


LEARNERS = ["nft_tiny", "awm_tiny", "ram_tiny", "grpo_trajectory_tiny"]
PRUNED = f"--config={FOLDER.parent / 'rollout' / 'pruned.yaml'}"


@pytest.mark.parametrize("name", rotated_after(1, LEARNERS))
def test_pruning_is_given_after_a_run(name: str) -> None:
    changed = parse(f"configs/align/{name}.yaml", "configs/rollout/pruned.yaml").config["fit"]
    assert changed["trainer"].default_root_dir == "runs/pruned"
    assert changed["model"]["init_args"]["pruning"].candidates == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(1, LEARNERS))
def test_pruning_is_estimated_and_trains(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, flops = f"--config={FOLDER / name}.yaml", []
    for files in ([run], [run, PRUNED]):
        main(["fit", *files, "--estimate"])
        flops.append(float(re.search(r"^  rollout +(\S+)", capsys.readouterr().out, re.MULTILINE)[1]))
    assert 1.2 < flops[1] / flops[0] < 1.8  # 14 passes for 10 of the policy, 3 for 1 of the reward
    small = ("--model.pruning.candidates=9", "--data.batch_size=4", "--data.prompts_per_rollout=2")
    quick = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_steps=2")
    main(["fit", run, PRUNED, f"--trainer.default_root_dir={tmp_path}", READOUT, *small, *quick])
    assert load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")


REWARDS = sorted(path.stem for path in (FOLDER.parent / "reward").glob("*.yaml"))


@pytest.mark.parametrize("name", rotated_after(1, REWARDS))
def test_a_reward_on_a_server_is_given_after_a_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("JUDGE_URL", "UNIRL_URL", "REWARD_URL"):
        monkeypatch.setenv(variable, f"http://{variable.lower().replace('_', '-')}:8000")
    changed = parse(RUN, f"configs/reward/{name}.yaml").config["fit"]
    assert changed["trainer"].default_root_dir == f"runs/reward_{name}"
    settings = changed["model"]["init_args"]
    assert settings["prompts_at_once"] == 1
    assert settings["reward"]["class_path"].endswith("HTTPReward")
    assert settings["reward"]["init_args"]["server"]["url"].startswith("http://")


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(2, CHANGES, release=6))
def test_a_change_of_grpo_trains_the_tiny_run(name: str, tmp_path: Path) -> None:
    small = ("--data.batch_size=4", "--data.prompts_per_rollout=2", "--model.sampling.num_inference_steps=6",
             "--model.num_trajectories=3")  # fmt: skip
    quick = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_steps=2")
    files = (f"--config={FOLDER / 'grpo_trajectory_tiny.yaml'}", f"--config={FOLDER.parent / 'grpo' / name}.yaml")
    by_levels = "--model.reward=tests.alignment.modules.simple_reward.OtherChannelsReward"
    reward = {"gardo": MIXTURE, "gdpo": MIXTURE, "uncertainty_gate": by_levels}.get(name, READOUT)
    main(["fit", *files, f"--trainer.default_root_dir={tmp_path}", reward, *small, *quick])
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert any(value.any() for key, value in weights.items() if "lora_B" in key or "lora.up" in key)


FAMILIES = sorted({twin.backbone for twin in TWINS.values()})
METHODS = ("StepwiseGRPOModule", "TrajectoryGRPOModule", "ReFLModule", "SPOModule")
KINDS = {
    "awm_sd35": AWMModule,
    "crd_sd35": CRDModule,
    "dgpo_sd35": DGPOModule,
    "grpo_stepwise_sd15": StepwiseGRPOModule,
    "grpo_stepwise_sd35": StepwiseGRPOModule,
    "grpo_trajectory_sd35": TrajectoryGRPOModule,
    "nft_sd35": DiffusionNFTModule,
    "opd_sd35": OnPolicyDistillationModule,
    "opsd_sd35": DiffusionOPSDModule,
    "ram_sd35": RAMModule,
}


@pytest.mark.slow
@pytest.mark.parametrize("method", rotated_after(1, METHODS))
@pytest.mark.parametrize("name", rotated_after(1, FAMILIES, release=2))
def test_one_option_changes_the_method(name: str, method: str) -> None:
    lpo, other = (
        parse(f"configs/policy/{name}.yaml", "configs/method/lpo.yaml", options=options).config["fit"]["model"]
        for options in ((), (f"--model={method}",))
    )
    assert other["class_path"] == f"latentreward.alignment.{method}"
    for setting in ("policy", "reward", "sampling", "optimizer", "guidance_scale"):
        assert other["init_args"][setting] == lpo["init_args"][setting]


@pytest.mark.slow
@pytest.mark.parametrize("name", release_after(2, KINDS))
def test_builds_at_full_size(name: str) -> None:
    with torch.device("meta"):
        module = parse(f"configs/align/{name}.yaml", options=REWARD.get(name.removesuffix("_sd35"), (TOY,))).build(
            "model"
        )
    assert isinstance(module, KINDS[name])
    trained = {key for key, value in module.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora" in key for key in trained)
    if name.startswith("grpo"):
        assert module.loss.clip_range == 1e-4
    assert len(module.sampler) == {"grpo_stepwise_sd15": 20, "awm_sd35": 14}.get(name, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(2, [name for name in FILES if name.endswith("_tiny")]))
def test_tiny_ones_train_under_guard(name: str, tmp_path: Path) -> None:
    small = ("--data.batch_size=4", "--data.prompts_per_rollout=2", "--model.sampling.num_inference_steps=3")
    quick = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_steps=2")
    own = f"--config={tmp_path / 'guards.yaml'}"
    (tmp_path / "guards.yaml").write_text(
        "trainer:\n  callbacks+:\n"
        "    - {class_path: CollapseGuard, init_args: {prompts: [a red circle], every_n_steps: 1, least: 0.01}}\n"
        "    - {class_path: SampleGrid, init_args: {prompts: '${oc.env:PROMPTS}', every_n_steps: 2}}\n"
        + MONITOR
        * (name != "opd_tiny")  # which has no reward
    )
    own_steps = ["--model.steps={class_path: StratifiedSteps, init_args: {count: 1, share: 1.0}}"]
    options = (
        f"--trainer.default_root_dir={tmp_path}",
        *REWARD.get(name.removesuffix("_tiny"), (TOY,)),
        *small,
        *quick,
        *(own_steps if name in ("awm_tiny", "dgpo_tiny") else []),
    )
    main(["fit", f"--config={FOLDER / name}.yaml", own, *options])
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert any(value.any() for key, value in weights.items() if "lora_B" in key or "lora.up" in key)
    assert (tmp_path / "samples" / "step_000002.png").is_file()


def size(prompts: list[str], images: list) -> torch.Tensor:
    """A scorer of pictures."""
    return torch.tensor([float(image.width) for image in images])


def test_a_loss_of_another_method_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", f"--config={FOLDER / 'grpo_trajectory_tiny.yaml'}", "--model.loss=NFTLoss"])
    assert "model.loss: NFTLoss is no class that this setting takes" in capsys.readouterr().err
