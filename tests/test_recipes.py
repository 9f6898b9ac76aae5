"""Every recipe, and every ablation of docs/recipes.md, through the parser and at full size on the meta device."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from torch import nn

from latentreward.apps.cli import main
from latentreward.apps.commands.fit import TrainingCLI
from latentreward.apps.estimate.pipelines import write_pipelines
from latentreward.core.registry import backbone_names
from latentreward.core.running import pair_generator
from latentreward.core.settings.functions import prepare_parsing
from latentreward.core.settings.rewriting import rewrite_arguments
from latentreward.data import PreferenceDataModule
from latentreward.reward import RewardModule
from tests.marks import release_after, rotated_after
from tests.tiny_pipelines import pipeline_folder

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "tests" / "formats" / "data"
FOLDER = ROOT / "configs" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
PAGE = (ROOT / "docs" / "recipes.md").read_text()
ABLATIONS = {
    name: tuple(re.findall(r"`(--[^`]*)`", settings)[0].split())
    for name, settings in re.findall(r"^\| `(\w+)` \| (`--[^|]*) \|", PAGE, flags=re.MULTILINE)
}
"""Name → settings, as the page's tables have them."""
NO_COPY = ("--data.train", ".memory_map=false")


class ParsedCLI(TrainingCLI):
    """The command line up to where it would make the trainer."""

    def instantiate_classes(self) -> None:
        """Nothing yet; see :meth:`build`."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""

    def build(self, part: str) -> Any:
        """The ``model``, the ``data``, or the settings of the ``trainer`` with its callbacks, as ``fit`` makes them."""
        settings = Namespace(subcommand="fit", fit=Namespace({part: self.config["fit"][part]}))
        return self.parser.instantiate(settings)["fit"][part]


def parse(*files: str, options: tuple[str, ...] = ()) -> ParsedCLI:
    """The command line of files and options, parsed once per environment; tests do not change what they get."""
    return _parse(files, options, frozenset(item for item in os.environ.items() if not item[0].startswith("PYTEST_")))


@cache
def _parse(files: tuple[str, ...], options: tuple[str, ...], environment: frozenset[tuple[str, str]]) -> ParsedCLI:
    arguments = [*(f"--config={ROOT / file}" for file in files), *options]
    prepare_parsing(arguments, classes=True)
    return ParsedCLI("fit", rewrite_arguments(arguments, backbone_names(), root="fit."), ExitStack())


def stack_of(recipe: Path) -> list[str]:
    """The files of the first command in the head comment."""
    head = re.sub(r"\\\n#", "", recipe.read_text())
    command = re.search(r"^# +latentreward fit(.*)$", head, flags=re.MULTILINE)
    assert command, f"the head comment of {recipe.name} gives no command"
    return re.findall(r"--config (\S+)", command[1])


def recipe(name: str) -> list[str]:
    return stack_of(FOLDER / f"{name}.yaml")


def ablation(name: str) -> tuple[list[str], tuple[str, ...]]:
    """Files and options of an ablation, or of a recipe."""
    options = tuple(os.path.expandvars(option) for option in ABLATIONS.get(name, ()))
    return recipe(name if not options else "lrm_sd15" if name.startswith("lrm") else "dina_lrm_sd35"), options


@cache
def on_meta(*files: str, options: tuple[str, ...] = ()) -> RewardModule:
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_uniform_"):
            patch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)  # of what has no numbers, a third of the time
        return parse(*files, options=options).build("model")


def trained(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def millions(network: nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1)


@pytest.fixture(scope="module", autouse=True)
def _paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folders = write_pipelines(tmp_path_factory.mktemp("full_size"))
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in folders.items():
            patch.setenv(f"{name.upper()}_PATH", folder)
        for name in ("pickapic_v1", "hpdv2", "hpdv3"):
            patch.setenv(f"{name.removesuffix('_v1').upper()}_ROOT", str(SAMPLES / name))
        patch.setenv("CACHE_ROOT", "cache")
        patch.setenv("MPCF_SCORES", str(SAMPLES / "lrm_mpcf" / "pseudo_preference.csv"))
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    rotated_after(1, RECIPES),
    ids=lambda path: path.stem,
)
def test_builds_at_full_size_as_its_head_comment_says(path: Path) -> None:
    files = stack_of(path)
    assert ROOT / files[-1] == path
    module = on_meta(*files)
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    logger = parse(*files).config["fit"]["trainer"].logger.init_args  # a folder of its own, or `last` finds another run
    assert (logger.save_dir, logger.name, logger.version) == ("runs", path.stem, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", release_after(1, ABLATIONS))
def test_an_ablation_builds_at_full_size(name: str) -> None:
    files, options = ablation(name)
    ours, plain = (parse(*files, options=given).config["fit"] for given in (options, ()))
    assert options and (ours["model"], ours["data"]) != (plain["model"], plain["data"])
    assert {parameter.device.type for parameter in on_meta(*files, options=options).parameters()} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(1, ["lrm_sd15", "lrm_sdxl", "lrm_sd3", "dina_lrm_sd35"]))
def test_recipe_has_the_model_of_its_model_file(name: str) -> None:
    files = [f"configs/{room}/{name}.yaml" for room in ("recipes", "model")]
    spelt_out, left_out = (parse(file).config["fit"]["model"].clone() for file in files)
    assert spelt_out.init_args.pop("levels") is not None
    assert left_out.init_args.pop("levels") is None
    assert spelt_out == left_out
    ours, theirs = (on_meta(file).levels for file in files)
    assert type(ours) is type(theirs)
    assert str(vars(ours)) == str(vars(theirs))


@pytest.mark.slow
def test_sd15_trains_down_path_mid_block_and_text_encoder() -> None:
    module = on_meta(*recipe("lrm_sd15"))
    backbone, head = module.model.backbone, module.model.head
    assert millions(backbone.unet) == 348.7
    assert trained(backbone.unet) == sum(parameter.numel() for parameter in backbone.unet.parameters())
    assert round(trained(backbone.text_encoder) / 1e6, 1) == 123.1
    assert (head.visual_projection.in_features, head.visual_projection.out_features) == (4800, 768)
    assert head.text_projection.weight.shape == (768, 768)
    assert trained(backbone.vae) == 0


@pytest.mark.slow
def test_dina_trains_adapters_and_head() -> None:
    module = on_meta(*recipe("dina_lrm_sd35"))
    transformer = module.model.backbone.transformer
    assert trained(transformer) == 28_311_552
    assert round((sum(p.numel() for p in transformer.parameters()) - trained(transformer)) / 1e6, 1) == 1237.6
    assert trained(module.model.head) == 139_296_003
    assert trained(module) == 28_311_552 + 139_296_003
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.slow
def test_released_constants_replace_the_papers() -> None:
    paper, code = parse(*recipe("dina_lrm_sd35")), parse(*recipe("dina_lrm_sd35_code"))
    sigmas = [cli.config["fit"]["model"].init_args.loss.init_args.sigma_u for cli in (paper, code)]
    assert sigmas[0] ** 2 == pytest.approx(0.01)
    assert sigmas[1] ** 2 == pytest.approx(0.05)
    kinds = [{type(callback).__name__ for callback in cli.build("trainer").callbacks} for cli in (paper, code)]
    assert kinds[0] - kinds[1] == {"TrainableEMA"}
    assert kinds[1] < kinds[0]


@pytest.mark.parametrize(
    ("name", "pairs_per_step"),
    rotated_after(1, [("lrm_sd15", 128), ("lrm_sdxl", 32), ("lrm_sd3", 32), ("lrm_hpdv2", 128), ("dina_lrm_sd35", 32)]),
)
def test_pairs_per_step_are_the_published_ones(name: str, pairs_per_step: int) -> None:
    settings = parse(*recipe(name)).config["fit"]
    trainer = settings.trainer
    accumulated = trainer.get("accumulate_grad_batches") or 1
    assert settings.data.init_args.batch_size * trainer.devices * accumulated == pairs_per_step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "low", "high"),
    rotated_after(
        1,
        [
            ("lrm_sd15", 1, 951),
            ("dina_levels_constant", 399, 401),
            ("lrm_timesteps_from_751", 751, 951),
            ("lrm_timestep_1", 1, 1),
            ("dina_clean", 2.99, 3.0),
        ],
    ),
)
def test_levels_stay_in_their_range(name: str, low: float, high: float) -> None:
    files, options = ablation(name)
    module = on_meta(*files, options=options)
    process = module.model.backbone.noise_process
    drawn = [module.levels.draw(pair_generator(0, "timestep", 0, str(pair)), process).item() for pair in range(50)]
    assert low <= min(drawn) <= max(drawn) <= high
    assert len(set(drawn)) > 1 or high - low < 3


def rows(name: str, *options: str) -> int:
    """Training pairs that a recipe finds in the sample files, whose splits share prompts."""
    files, given = ablation(name)
    rest = ("--data.val=null", "--data.test=null", "--data.num_workers=0", *options)
    cli = parse(*files, options=(*given, *rest))
    data = cli.build("data")
    assert isinstance(data, PreferenceDataModule)
    return len(data.datasets["train"])


@pytest.mark.slow
def test_filter_strategies_keep_the_sample_rows_they_should() -> None:
    expected = json.loads((SAMPLES / "EXPECTED.json").read_text())["lrm_mpcf"]
    names = {1: "lrm_mpcf_strategy_1", 2: "lrm_sd15", 3: "lrm_mpcf_strategy_3"}
    for strategy, name in names.items():
        assert rows(name, f"{NO_COPY[0]}.reader{NO_COPY[1]}") == len(expected[f"strategy_{strategy}_kept_rows"])
    assert rows("lrm_without_mpcf", "".join(NO_COPY)) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pipeline", "options"),
    rotated_after(
        1,
        [
            (
                "dina_lrm_sd35",
                "sd35",
                [
                    "--model.backbone.num_layers=4",
                    "--model.backbone.visual_taps=[1, 3]",
                    "--model.backbone.text_taps=[1, 3]",
                    "--model.head.num_heads=2",
                ],
            ),
            ("lrm_hpdv2", "sd15", ["--model.head.text_projection_source=null"]),
        ],
    ),
)
def test_recipe_trains_where_only_its_size_is_another(
    name: str, pipeline: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{pipeline.upper()}_PATH", pipeline_folder(pipeline))
    monkeypatch.chdir(tmp_path)
    small = ["--data.size=16", "--data.batch_size=2", "--data.num_workers=0", "--data.shared_prompts=drop"]
    cpu = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.precision=32-true"]
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.enable_progress_bar=false"]
    files = [f"--config={ROOT / file}" for file in recipe(name)]
    main(["fit", *files, *small, *cpu, *short, *options])
    assert list((tmp_path / "runs" / name / "checkpoints").glob("*.ckpt"))


def test_tables_name_every_recipe_and_the_ablations() -> None:
    assert {path.stem for path in RECIPES} <= set(re.findall(r"`(\w+)`", PAGE))
    assert len(ABLATIONS) == 32
