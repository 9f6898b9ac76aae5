"""Shared by all tests: one thread, so that parallel runs on few cores do not fight, and no downloads."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for what tests start: idle threads of OpenMP spin on others' cores

import pytest
import torch

from tests.budget import cpu_budget
from tests.marks import in_turn

if TYPE_CHECKING:
    from tests.browser import Pages

torch.set_num_threads(1)
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # under nohup, and after `&` in a script
        signal.signal(number, handler)
gc.disable()  # until all is imported: looking through what stays takes a quarter of the collection's time

LONGEST = [
    "docs/test_site",
    "apps/estimate/test_estimate",
    "statistical/test_learning",
    "test_align_configs",
    "apps/taste/test_taste",
    "test_end_to_end",
    "test_recipes",
    "tools/reproduction/test_rows",
    "distributed/test_frozen",
    "diffusion/families/test_full_size",
    "apps/estimate/test_step_costs",
    "distributed/test_grpo",
    "apps/commands/test_score",
    "distributed/test_workers",
    "faults/test_training_faults",
    "distributed/test_sharding",
    "docs/test_tutorial",
    "diffusion/families/test_processes",
    "test_composed_configs",
    "test_packaging",
    "diffusion/backbones/test_tuning",
    "faults/test_cache_kill",
    "distributed/test_lpo",
    "diffusion/cache/test_faults",
    "tools/pretraining/test_pixel_scorers",
    "distributed/test_checkpoints",
    "distributed/test_equality",
    "apps/serving/test_processes",
    "diffusion/cache/test_datamodule",
    "security/test_reward_folders",
    "alignment/modules/test_forward_process",
    "callbacks/test_exact_resume",
    "apps/commands/test_benchmark",
    "reward/scoring/test_score_invariance",
    "tinyworld/test_pipelines",
    "distributed/test_alignment",
    "reward/scoring/test_pretrained",
    "reward/modules/test_reward_module",
    "apps/commands/test_evaluate_policy",
    "apps/test_cli",
    "alignment/modules/test_grpo",
]
"""Files of tests that take longest; begun last, one of them would keep one process busy and leave the others idle."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `.ci/run` name the commit whose turn it is, and a developer limit the processor time of fast cases."""
    parser.addoption("--rotation", metavar="COMMIT", help="of rotated cases run only an eighth, another one per COMMIT")
    parser.addoption(
        "--cpu-budget",
        metavar="SECONDS",
        type=float,
        help="fail cases whose call, fixtures aside, takes longer on the processor and that are not slow, gpu, browser",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the rotated cases whose turn it is not, and put the files that take longest first."""
    if commit := config.getoption("--rotation"):
        items[:], left = in_turn(items, commit)
        config.hook.pytest_deselected(items=left)
    places = {f"tests/{name}.py": place for place, name in enumerate(LONGEST)}
    assert all(Path(file).is_file() for file in places), "LONGEST names a file that is not there"
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


def pytest_collection_finish() -> None:
    """Collect garbage from now on, among what comes from now on, and seldom: networks are thousands of objects."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With pytest-xdist, a file stays in one process, for its fixtures' sake, and so do all golden tests.

    The golden ones are counted together. (Its ``--dist=loadgroup`` does not see groups under pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # else files with many tests come first, however short these are

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "golden" if nodeid.startswith("tests/golden/") else nodeid.split("::", maxsplit=1)[0]

    return ByFile(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Hold fast cases to ``--cpu-budget``, where it is given: seconds depend on the machine.

    Golden ones replay whole recordings, and are counted together, so that none of them is slow.
    """
    limit = item.config.getoption("--cpu-budget")
    marked = any(map(item.get_closest_marker, ("slow", "gpu", "browser")))
    free = limit is None or marked or item.nodeid.startswith("tests/golden/")
    with nullcontext() if free else cpu_budget(limit):
        return (yield)


@pytest.fixture(autouse=True, scope="session")
def _first_uses(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Under ``--cpu-budget``, train a tiny reward: what libraries load at first use is no case's own time."""
    if request.config.getoption("--cpu-budget") is not None:
        from latentreward.apps.cli import main

        folder = tmp_path_factory.mktemp("first_uses")
        files = [
            f"--config=configs/{name}.yaml" for name in ("model/lrm_tiny", "data/tinyworld_pickapic", "trainer/cpu")
        ]
        small = ["--data.train_pairs=8", "--data.val_pairs=4", "--data.batch_size=4", "--trainer.max_steps=1"]
        main(["fit", *files, *small, f"--data.root={folder / 'pairs'}", f"--trainer.logger.save_dir={folder}"])


@pytest.fixture(autouse=True)
def _same_numbers() -> Iterator[None]:
    """One seed, and one thread, which changes the last bits too: Lightning sets their number for several processes.

    Lightning also leaves a process group behind, which a metric of the next test would gather over.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def package_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only backbones of the package are registered: a message lists a bounded number of names, and tests add more."""
    from latentreward.core import registry

    own = {name: path for name, path in registry.backbone_names().items() if path.startswith("latentreward.")}
    monkeypatch.setattr(registry, "_PATHS", own)


@pytest.fixture
def bases_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the tiny pipelines is the current one: a model folder names a local base without its place."""
    from tests.tiny_pipelines import pipeline_folder

    monkeypatch.chdir(Path(pipeline_folder("sd15")).parent)


@pytest.fixture
def browser_page() -> "Iterator[Pages]":
    """``browser_page(path_or_url, width=1200, dark=False)`` opens a page in Chromium, as a ``playwright`` page.

    The test fails if, by its end, a page has logged an error, raised one, failed to load something or asked for
    anything outside this machine; ``browser_page.problems`` has these lines.
    """
    from tests.browser import NAMES, chromium, opened_pages

    executable = chromium()
    if executable is None:
        pytest.fail(f"needs one of {', '.join(NAMES)} on PATH; try: apt-get install chromium", pytrace=False)
    with opened_pages(executable) as pages:
        yield pages
        pages.settle()
        if pages.problems:
            pytest.fail("\n".join(pages.problems), pytrace=False)
