"""Each YAML file of alignment parses, builds at full size, and trains a tiny policy; so do files that change a run."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentreward import alignment
from latentreward.apps.cli import main
from latentreward.apps.estimate.pipelines import write_pipelines
from latentreward.tinyworld.writers import write_pickapic
from tests.marks import release_after, rotated_after
from tests.test_recipes import parse

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(path.stem for path in (CONFIGS / "align").glob("*.yaml"))
TOY = "--model.reward=tests.alignment.modules.simple_reward.FirstChannelReward"
BRIGHT = "--model.reward=tests.alignment.modules.toy_rewards.BrightnessSource"
READOUT = '--model.reward={"class_path": "RandomReward", "init_args": {"kind": "readout"}}'
MIXTURE = (
    '--model.reward={"class_path": "RewardMixture", "init_args": {"rewards": '
    '[{"class_path": "RandomReward", "init_args": {"kind": "readout", "seed": 1}},'
    ' {"class_path": "RandomReward", "init_args": {"kind": "readout", "seed": 2}}], "normalise": "none"}}'
)
QUICK = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_steps=2")
GUARDS = (
    "trainer:\n  callbacks+:\n"
    "    - {class_path: CollapseGuard, init_args: {prompts: [a red circle], every_n_steps: 1, least: 0.01}}\n"
    "    - {class_path: SampleGrid, init_args: {prompts: '${oc.env:PROMPTS}', every_n_steps: 2}}\n"
)
MONITOR = (
    "    - class_path: HackingMonitor\n"
    "      init_args: {prompts: '${oc.env:PROMPTS}', every_n_steps: 2, action: warn, held_out:\n"
    "        {class_path: CallableScorer, init_args: {function: tests.test_align_configs.size, name: size}}}\n"
)


@pytest.fixture(scope="module", autouse=True)
def _paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folders = write_pipelines(tmp_path_factory.mktemp("full_size"))
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red circle on a black background\ntwo blue squares on a white background\n")
    places = ["PICKAPIC_ROOT", "HPDV3_ROOT", "CACHE_ROOT", "LRM_PATH", "DINA_PATH", "SPM_PATH", "REWARD_PATH"]
    servers = {f"{name}_URL": f"http://{name.lower()}:8000" for name in ("JUDGE", "REWARD")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            **{f"{name.upper()}_PATH": folder for name, folder in folders.items()},
            **{name: name.lower() for name in places},
            **servers,
            "SD21_BASE_PATH": folders.get("sd21", ""),
            "PROMPTS": str(prompts),
        }.items():
            patch.setenv(name, value)
        yield


def trained(folder: Path) -> bool:
    """Whether a run's LoRA is finite and has moved from zero."""
    (file,) = (folder / "lora").glob("*.safetensors")
    weights = load_file(file)
    up = [value for key, value in weights.items() if "lora_B" in key or "lora.up" in key]
    return all(value.isfinite().all() for value in weights.values()) and any(value.any() for value in up)


def size(prompts: list[str], images: list) -> torch.Tensor:
    """A scorer of pictures."""
    return torch.tensor([float(image.width) for image in images])


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(3, FILES, release=9))
def test_parses_and_keeps_its_runs_apart(name: str) -> None:
    assert parse(f"configs/align/{name}.yaml").config["fit"]["trainer"].default_root_dir == f"runs/{name}"


def run_files(run: str) -> list[str]:
    """Files of a run: one of configs/align, or those of a policy and a method."""
    policy, _, method = run.partition(" ")
    return (
        [f"configs/policy/{policy}.yaml", f"configs/method/{method}.yaml"] if method else [f"configs/align/{run}.yaml"]
    )


KINDS = {
    "sd35_medium awm": ("AWMModule", TOY),
    "sd35_medium crd": ("CRDModule", TOY),
    "sd35_medium dgpo": ("DGPOModule", TOY),
    "diffusion_dpo_sd15": ("DiffusionDPOModule",),
    "sd35_medium diffusion_dpo": ("DiffusionDPOModule",),
    "grpo_stepwise_sd15": ("StepwiseGRPOModule", TOY),
    "sd35_medium grpo_trajectory": ("TrajectoryGRPOModule", TOY),
    "lpo_sd15": ("LPOModule", BRIGHT),
    "lpo_sd3": ("LPOModule", BRIGHT),
    "lpo_sdxl": ("LPOModule", BRIGHT),
    "sd35_medium nft": ("DiffusionNFTModule", TOY),
    "sd35_medium opd": ("OnPolicyDistillationModule",),
    "opsd_sd35": ("DiffusionOPSDModule", BRIGHT),
    "sd35_medium ram": ("RAMModule", TOY),
}
STEPS = {
    "grpo_stepwise_sd15": 20,
    "lpo_sd15": 20,
    "lpo_sdxl": 20,
    "sd35_medium awm": 14,
    "sd35_medium grpo_trajectory": 10,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", release_after(4, sorted(KINDS, key=lambda name: name not in STEPS)))
def test_builds_at_full_size(name: str) -> None:
    kind, *options = KINDS[name]
    with torch.device("meta"):
        module = parse(*run_files(name), options=tuple(options)).build("model")
    assert type(module) is getattr(alignment, kind)
    learns = {key for key, value in module.named_parameters() if value.requires_grad}
    assert learns and all("lora" in key for key in learns)
    if name in STEPS:
        assert len(module.sampler) == STEPS[name]
    if "grpo" in name:
        assert module.loss.clip_range == 1e-4
    if name == "lpo_sd15":
        assert module.selection.threshold(0, module.sampler) == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(4, [name for name in FILES if name.endswith("_tiny")]))
def test_tiny_ones_train_under_guard(name: str, tmp_path: Path) -> None:
    """With rewards that are formulas: what configs/model/lrm_tiny.yaml trains takes a minute."""
    method = name.removesuffix("_tiny").removesuffix("_sd35")
    pairs = (f"root={tmp_path / 'pairs'}", "train_pairs=64", "val_pairs=16", "batch_size=2")
    small = ["--data.batch_size=4", "--data.prompts_per_rollout=2", "--model.sampling.num_inference_steps=4"]
    reward = [BRIGHT if method in ("lpo", "spo", "opsd") else TOY]
    if method == "diffusion_dpo":
        small, reward = [f"--data.{option}" for option in pairs], []
    elif method in ("refl", "refl_state"):
        small, reward = ["--data.batch_size=2", "--data.batches_per_epoch=2"], [BRIGHT]
    elif method == "prfl":
        small = ["--data.prompts.batch_size=2", "--data.prompts.batches_per_epoch=2"]
        small, reward = [*small, *(f"--data.images.{option}" for option in pairs)], [BRIGHT]
    elif method in ("lpo", "spo"):
        small += ["--model.selection={class_path: QuantileThreshold, init_args: {quantile: 0.5}}"]
    elif method in ("awm", "dgpo"):
        small += ["--model.steps={class_path: StratifiedSteps, init_args: {count: 1, share: 1.0}}"]
    guarded = method in ("awm", "crd", "dgpo", "nft", "ram", "grpo_stepwise", "grpo_trajectory", "opsd", "opd")
    (tmp_path / "guards.yaml").write_text(GUARDS + MONITOR * (method != "opd"))  # which has no reward
    files = [CONFIGS / "align" / f"{name}.yaml", *([tmp_path / "guards.yaml"] if guarded else [])]
    options = [*small, *(reward if method != "opd" else []), *QUICK, f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *(f"--config={file}" for file in files), *options])
    assert trained(tmp_path) and (tmp_path / "config.yaml").is_file()
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2 and any("lora" in key for key in last["state_dict"])
    assert not [key for key in last["state_dict"] if re.search("base_layer|vae|text_encoder", key)]  # what is frozen
    assert (tmp_path / "samples" / "step_000002.png").is_file() or not guarded


LEARNERS = ["nft_tiny", "awm_tiny", "ram_tiny", "grpo_trajectory_tiny"]
CHANGES = [
    *((name, "rollout/pruned") for name in LEARNERS),
    *(("sd35_medium grpo_trajectory", f"{path.parent.name}/{path.stem}") for room in ("grpo", "reward")
      for path in sorted((CONFIGS / room).glob("*.yaml"))),
    *((run, "dpo/linear") for run in ("diffusion_dpo_sd15", "diffusion_dpo_tiny", "sd35_medium diffusion_dpo")),
]  # fmt: skip
"""Runs, and files that are given after them."""


@pytest.mark.parametrize(("run", "change"), rotated_after(2, CHANGES))
def test_a_change_is_given_after_a_run(run: str, change: str) -> None:
    """It has a folder of its own, and leaves the policy and its optimiser as they are."""
    files = run_files(run)
    plain, changed = parse(*files).config["fit"], parse(*files, f"configs/{change}.yaml").config["fit"]
    room, name = change.split("/")
    folder = {"rollout": "pruned", "dpo": "linear_dpo"}.get(room, f"{room}_{name}")
    assert changed["trainer"].default_root_dir == f"runs/{folder}"
    before, after = plain["model"]["init_args"], changed["model"]["init_args"]
    assert before != after
    assert all(before[setting] == after[setting] for setting in ("policy", "optimizer"))


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(2, sorted(path.stem for path in (CONFIGS / "grpo").glob("*.yaml"))))
def test_a_change_of_grpo_trains_the_tiny_run(name: str, tmp_path: Path) -> None:
    small = ("--data.batch_size=4", "--data.prompts_per_rollout=2", "--model.sampling.num_inference_steps=6",
             "--model.num_trajectories=3")  # fmt: skip
    files = (f"--config={CONFIGS}/align/grpo_trajectory_tiny.yaml", f"--config={CONFIGS}/grpo/{name}.yaml")
    reward = {"gardo": MIXTURE, "gdpo": MIXTURE}.get(name, READOUT)
    main(["fit", *files, f"--trainer.default_root_dir={tmp_path}", reward, *small, *QUICK])
    assert trained(tmp_path)


@pytest.mark.slow
def test_a_tiny_policy_trains_by_linear_dpo(tmp_path: Path) -> None:
    folder = write_pickapic(tmp_path / "pairs", {"train": 32, "validation": 8}, seed=0)
    files = [f"--config={CONFIGS / file}.yaml" for file in ("align/diffusion_dpo_tiny", "dpo/linear")]
    small = [f"--data.root={folder}", "--data.train_pairs=32", "--data.val_pairs=8", "--data.batch_size=4"]
    main(["fit", *files, *small, *QUICK, "--trainer.limit_val_batches=0", f"--trainer.default_root_dir={tmp_path}"])
    assert trained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(1, LEARNERS))
def test_pruning_is_estimated_and_trains(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, pruned, flops = f"--config={CONFIGS}/align/{name}.yaml", f"--config={CONFIGS}/rollout/pruned.yaml", []
    for files in ([run], [run, pruned]):
        main(["fit", *files, "--estimate"])
        flops.append(float(re.search(r"^  rollout +(\S+)", capsys.readouterr().out, re.MULTILINE)[1]))
    assert 1.2 < flops[1] / flops[0] < 1.8  # 14 passes for 10 of the policy, 3 for 1 of the reward
    small = ("--model.pruning.candidates=9", "--data.batch_size=4", "--data.prompts_per_rollout=2")
    main(["fit", run, pruned, f"--trainer.default_root_dir={tmp_path}", READOUT, *small, *QUICK])
    assert trained(tmp_path)
