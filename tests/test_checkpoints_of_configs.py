"""A finished run of every shipped config leaves ``last.ckpt``: the last step, written once, without frozen weights."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from latentreward.alignment.policies.moving_average import AVERAGE, OLD
from latentreward.apps.cli import main
from tests.diffusion.families.twins import TWINS
from tests.marks import rotated_after
from tests.reward.scorers.tiny_clip import write_clip
from tests.test_recipes import RECIPES, ROOT, SAMPLES, stack_of
from tests.tiny_pipelines import PIXELS, pipeline_folder

CONFIGS = ROOT / "configs"
QUICK = ("lrm_tiny", "diffusion_dpo_tiny")
IN_CI = [
    *["awm_tiny", "dina_lrm_sd35", "diffusion_dpo_sd15", "grpo_stepwise_tiny", "grpo_trajectory_tiny", "lpo_sd15"],
    *["lpo_sd35_tiny", "lrm_hpdv2", "lrm_sdxl", "nft_tiny", "opsd_tiny", "prfl_tiny", "ram_tiny"],
    "refl_sd15",
]
"""One of each module, and of each kind of network and of data; the others are for a release."""
BATCHES, STEPS = 2, 3
"""Batches of an epoch and steps of a run, whose end is neither that of an epoch nor due by any interval."""
PIPELINES = {
    "SD15": "sd15",
    "SD21": "sd21",
    "SD21_BASE": "sd21",
    "SDXL": "sdxl",
    "SD3": "sd3_deep",
    "SD35": "sd35_deep",
}
TWIN_OF = {twin.backbone: twin for twin in reversed(TWINS.values())}
"""Backbone in a config's name → its first twin, which the config runs with here, with few blocks and heads."""
FEW_BLOCKS = (
    "--data.size=32",
    "--model.backbone.num_layers=3",
    "--model.backbone.visual_taps=[1,2,3]",
    "--model.backbone.text_taps=[1,2,3]",
    "--model.head.num_heads=2",
)
FOLDERS = {"PICKAPIC": "pickapic_v1", "HPDV2": "hpdv2", "HPDV3": "hpdv3"}
HERE = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.strategy=auto",
    "--trainer.accumulate_grad_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks+=tests.test_checkpoints_of_configs.Saves",
)
PAIRS = (
    f"--trainer.max_steps={STEPS}",
    f"--trainer.limit_train_batches={BATCHES}",
    f"--trainer.val_check_interval={BATCHES}",
    "--trainer.limit_val_batches=1",
    "--data.num_workers=0",
    "--data.batch_size=2",
)
TINY_WORLD = (*PAIRS, "--data.train_pairs=8", "--data.val_pairs=4")
SAMPLE_FILES = (*PAIRS, f"--data.size={PIXELS}", "--data.shared_prompts=keep")
NO_COPY = "--data.train.memory_map=false"
ROLLOUTS = (
    f"--data.batches_per_epoch={BATCHES}",
    "--data.batch_size=2",
    "--data.prompts_per_rollout=3",
    "--model.sampling.num_inference_steps=4",
)


class Saves(Callback):
    """The optimiser step of each save that has the optimiser's state, and what the run had at its end."""

    last: "Saves"

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.end = 0
        self.frozen: set[str] = set()
        Saves.last = self

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end = trainer.global_step
        every = pl_module.named_parameters(remove_duplicate=False)
        moving = {f".{copy}." for copy in (OLD, AVERAGE)}  # no gradient, but they follow the adapter that trains
        self.frozen = {name for name, one in every if not (one.requires_grad or any(copy in name for copy in moving))}


@dataclass(frozen=True)
class Run:
    """A finished run: its arguments, its folder, its saves, and its checkpoints by their names."""

    arguments: tuple[str, ...]
    folder: Path
    saves: Saves
    checkpoints: dict[str, dict[str, Any]]


@cache
def finished(path: Path) -> Run:
    """The run of a file, with the files that go with it; alignment takes that of another file as its reward."""
    options = {"model": reward_options, "align": alignment_options, "recipes": recipe_options}[path.parent.name](path)
    arguments = (*options, *HERE)
    main(["fit", *arguments])
    folder = Path("recipes" if path in RECIPES else "runs", path.stem).absolute()
    files = (folder / "checkpoints").iterdir()
    return Run(arguments, folder, Saves.last, {file.name: torch.load(file, weights_only=True) for file in files})


@pytest.fixture(scope="module", autouse=True)
def _places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One folder for all runs, since alignment finds its reward in ``runs``, and the variables that configs read."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "prompts.txt").write_text("a cat\ntwo dogs\nthe sun\n")
    clip = write_clip(folder / "clip")
    values = {
        **{f"{name}_PATH": pipeline_folder(pipeline) for name, pipeline in PIPELINES.items()},
        **{f"{name.upper()}_PATH": twin.folder for name, twin in TWIN_OF.items()},
        **{f"{name}_PATH": clip for name in ("CLIP_L", "CLIP_H", "PICKSCORE")},
        **{f"{name}_ROOT": str(SAMPLES / place) for name, place in FOLDERS.items()},
        "MPCF_SCORES": str(SAMPLES / "lrm_mpcf" / "pseudo_preference.csv"),
        "PROMPTS": str(folder / "prompts.txt"),
        "CACHE_ROOT": str(folder / "cache"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        yield


def reward_options(path: Path) -> list[str]:
    """Of a file of configs/model, with the shipped data that it goes with."""
    dina, tiny = path.stem.startswith("dina"), path.stem.endswith("_tiny")
    data = ("tinyworld_hpdv3" if dina else "tinyworld_pickapic") if tiny else ("hpdv3" if dina else "pickapic_v1")
    files = (path, CONFIGS / "data" / f"{data}.yaml", CONFIGS / "trainer" / "cpu.yaml")
    own = TINY_WORLD if tiny else SAMPLE_FILES if dina else (*SAMPLE_FILES, NO_COPY)
    own = (*own, *FEW_BLOCKS) if path.stem.removeprefix("dina_lrm_") in TWIN_OF else own
    return [*(f"--config={file}" for file in files), *own, f"--trainer.logger.name={path.stem}"]


def recipe_options(path: Path) -> list[str]:
    """Of a file of configs/recipes, with those before it in its head comment."""
    files, own = stack_of(path), [*SAMPLE_FILES, "--trainer.logger.save_dir=recipes"]
    if "CACHE_ROOT" in path.read_text():
        own.remove(f"--data.size={PIXELS}")
        write_caches()
    elif path.stem in ("lrm_sd15", "lrm_sdxl", "lrm_sd3"):
        own.append(NO_COPY.replace("train.", "train.reader."))
    return [*(f"--config={ROOT / file}" for file in files), *own]


def alignment_options(path: Path) -> list[str]:
    """Of a file of configs/align, after the run of its reward."""
    text = path.read_text()
    if reward := reward_of(path):
        run = finished(reward).folder
        values = {"LRM_PATH": run, "DINA_PATH": run, "SPM_PATH": run / "checkpoints" / "last.ckpt"}
        os.environ.update({name: str(value) for name, value in values.items()})
    options = [f"--config={with_tiny_scorers(path)}"]
    if "CACHE_ROOT" in text:
        write_caches()
        return [*options, *PAIRS]
    if "DiffusionDPOModule" in text:
        return [*options, *(TINY_WORLD if path.stem.endswith("_tiny") else (*SAMPLE_FILES, NO_COPY))]
    rollouts = ROLLOUTS
    if "PromptsAndImages" in text.partition("\ndata:")[2]:
        rollouts = tuple(option.replace("--data.", "--data.prompts.") for option in ROLLOUTS)
        images = TINY_WORLD if path.stem.endswith("_tiny") else SAMPLE_FILES
        options += [option.replace("--data.", "--data.images.") for option in images if option.startswith("--data.")]
    options += [*rollouts, "--data.passes=1" if "passes:" in text else f"--trainer.max_steps={STEPS}"]
    if "height:" in text:
        options += [f"--model.sampling.height={PIXELS}", f"--model.sampling.width={PIXELS}"]
    if path.stem.partition("_")[2] in TWIN_OF:
        options += ["--model.sampling.height=32", "--model.sampling.width=32"]
    if "stop_range:" in text:
        options += [f"--model.stop_range={[2, 3] if 'scored: state' in text else [1, 2]}"]
    if "AWMModule" in text or "DGPOModule" in text:  # which train on 6 of the steps between the ends, 4 of the first
        options += ["--model.sampling.num_inference_steps=8"]
    if few := re.search(r"num_(trajectories|candidates|samples):", text):
        options += [f"--model.{'candidates.' * (few[1] == 'candidates')}num_{few[1]}=2"]
    if "selection:" in text:  # a reward that has hardly learned has gaps below every published threshold
        options += ["--model.selection={class_path: QuantileThreshold, init_args: {quantile: 0.5}}"]
    return options


def reward_of(path: Path) -> Path | None:
    """The file of configs/model whose run an alignment takes as its reward."""
    text, family = path.read_text(), path.stem.partition("_")[2]
    if family not in TWIN_OF:
        family = family.rpartition("_")[2].replace("sd21", "sd15")  # which has the VAE of SD1.5
    rewards = {"LRM_PATH": f"lrm_{family}", "DINA_PATH": f"dina_lrm_{family}", "SPM_PATH": f"spm_{family}"}
    named = re.search(r"path: runs/(\w+)|oc\.env:(LRM_PATH|DINA_PATH|SPM_PATH)", text)
    return CONFIGS / "model" / f"{named[1] or rewards[named[2]]}.yaml" if named else None


def with_tiny_scorers(path: Path) -> Path:
    """A copy of an alignment's file that takes a tiny CLIP where the file takes one from the hub by default."""
    tiny = "init_args: {source: '${oc.env:PICKSCORE_PATH}', processor: '${oc.env:CLIP_H_PATH}'}"
    copy = Path("align", path.name)
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(
        re.sub(r"\{class_path: (PickScorer|CLIPScorer)\}", rf"{{class_path: \1, {tiny}}}", path.read_text())
    )
    return copy


@cache
def write_caches() -> None:
    """Cache the sample files as the head comment of configs/cache/hpdv3_sd35.yaml says."""
    small = (
        "--trainer.accelerator=cpu",
        f"--images.buckets=[[{PIXELS},{PIXELS}]]",
        "--images.min_pixels=1",
        "--reader.min_confidence=null",
        "--num_workers=0",
    )
    for split in ("train", "test"):
        config = f"--config={CONFIGS / 'cache' / 'hpdv3_sd35.yaml'}"
        main(["cache", f"cache/{split}", config, f"--reader.split={split}", *small])


def _place(path: Path) -> tuple[bool, bool, Path]:
    """Make the key that puts quick files first, then those of CI."""
    return path.stem not in QUICK, path.stem not in IN_CI, path


FILES = [*(CONFIGS / "model").glob("*.yaml"), *(CONFIGS / "align").glob("*.yaml"), *RECIPES]
FILES.remove(CONFIGS / "model" / "dina_lrm_qwen_image_edit.yaml")  # these pairs have no pictures to edit


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    rotated_after(len(QUICK), sorted(FILES, key=_place), release=sum(path.stem in {*QUICK, *IN_CI} for path in FILES)),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_last_ckpt_is_of_the_last_step_written_once_and_without_frozen_weights(path: Path) -> None:
    run = finished(path)
    steps, frozen = run.saves.steps, run.saves.frozen
    assert steps[-1] == run.saves.end > 0
    assert len({*steps}) == len(steps)
    whole = {name: kept["global_step"] for name, kept in run.checkpoints.items() if "optimizer_states" in kept}
    assert whole == {"last.ckpt": run.saves.end}
    assert frozen
    last = run.checkpoints["last.ckpt"]["state_dict"]
    copies = {
        "DiffusionNFTModule": {OLD},
        "AWMModule": {OLD, AVERAGE},
        "RAMModule": {OLD},
        "DGPOModule": {OLD},
        "CRDModule": {OLD, AVERAGE},
        "DiffusionOPSDModule": {OLD},
    }
    method = next(iter(re.findall(r"\.(\w+Module)\b", path.read_text())), "")
    for copy in (OLD, AVERAGE):
        assert any(f".{copy}." in name for name in last) == (copy in copies.get(method, ()))
    for name, kept in run.checkpoints.items():
        assert kept["state_dict"], name
        assert not frozen & kept["state_dict"].keys(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", rotated_after(1, ["model/lrm_tiny", "align/lpo_sd35_tiny", "align/diffusion_dpo_sd15", "recipes/lrm_sd15"])
)
def test_a_run_goes_on_from_its_last_ckpt(file: str) -> None:
    run = finished(CONFIGS / f"{file}.yaml")
    assert run.saves.steps == [BATCHES, STEPS]
    main(["fit", *run.arguments, f"--trainer.max_steps={STEPS + 2}", "--ckpt_path=last"])
    assert Saves.last.steps == [STEPS + 1, STEPS + 2]
    kept = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == STEPS + 2
    assert {path.name for path in (run.folder / "checkpoints").iterdir()} == {*run.checkpoints}
    before, now = run.checkpoints["last.ckpt"]["state_dict"], kept["state_dict"]
    assert before.keys() == now.keys()
    assert any(not torch.equal(before[name], now[name]) for name in now)
