"""The shipped pilots: what they name exists, their commands parse, and their trainings fit a card of 24 GB."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from latentreward.apps.commands.fit import estimate_fit
from latentreward.apps.estimate.needs import ALLOWANCE, CONTEXT, training_needs
from latentreward.apps.evaluation.benchmark.published_numbers import FOUR_BENCHMARKS
from latentreward.apps.pilot.plans import BESIDE, STAGES, Pilot, all_pilots, find_pilot, read_pilot
from latentreward.apps.steps.tasks import load_yaml
from latentreward.cli import main
from latentreward.errors import InputError
from latentreward.storage.json_files import read_config
from tests.marks import release_after, rotated_after

ROOT = Path(__file__).resolve().parents[3]
PILOTS = all_pilots()
FULL = [pilot for pilot in PILOTS.values() if pilot.device == "gpu"]
CARD = 24 * 10**9
VARIABLE = re.compile(r"\$\{oc\.env:(\w+)(?:,([^}]*))?\}")


@pytest.fixture(autouse=True)
def _nothing_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the hub without files, no network, and folders of data that are named but not there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("latentreward.storage.hub._asked_once", lambda question: pytest.fail("asked the hub"))
    for pilot in PILOTS.values():
        for name, source in pilot.sources.items():
            monkeypatch.delenv(name, raising=False)
            if source.data:
                monkeypatch.setenv(name, str(tmp_path / name))


def files_of(pilot: Pilot) -> list[Path]:
    commands = " ".join(argument for step in pilot.stages.values() for argument in step.run)
    return [ROOT / name for name in re.findall(r"--config=(configs/\S+)", commands)]


@pytest.mark.parametrize("pilot", PILOTS.values(), ids=PILOTS)
def test_files_exist_and_every_variable_that_they_read_is_a_source(pilot: Pilot) -> None:
    own = [path for path in files_of(pilot) if path.is_relative_to(ROOT / "configs" / "pilot")]
    assert own
    for path in own:
        for name, default in VARIABLE.findall(path.read_text()):
            assert name in pilot.sources, f"{path.name}: {name}"
            assert default == pilot.sources[name].hub, f"{path.name}: {name}"


@pytest.mark.parametrize("pilot", PILOTS.values(), ids=PILOTS)
def test_licences_are_those_of_the_page(pilot: Pilot) -> None:
    page = (ROOT / "docs" / "licences.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for name, source in pilot.sources.items():
        for part in source.licence.replace(" (code)", "").split("; "):
            assert any(part in row for row in rows), f"{name}: {part}"
        assert source.hub in page or source.hub.split("/")[0] in (
            "stable-diffusion-v1-5",
            "stabilityai",
            "openai",
            "laion",
        )


@pytest.mark.parametrize("pilot", PILOTS.values(), ids=PILOTS)
def test_stages_follow_what_they_read_and_depend_on_settings(pilot: Pilot) -> None:
    tasks = pilot.tasks(100, 0, quick=False)
    seen: list[str] = []
    for name, task in tasks.items():
        assert set(task.inputs) <= set(seen), name
        seen.append(name)
    assert set(STAGES) <= set(seen) == set(pilot.stages)
    fewer, seeded = pilot.tasks(99, 0, quick=False), pilot.tasks(100, 1, quick=False)
    changed = {name for name in tasks if tasks[name].key != fewer[name].key}
    assert {"cache", "train", "benchmark", "align", "judged"} <= changed
    assert "published" not in changed
    assert tasks["align"].key != seeded["align"].key
    assert pilot.digest(100, 0, False) != pilot.digest(99, 0, False)


def test_another_folder_of_a_source_starts_again_but_is_the_same_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    pilot = find_pilot("sd15")
    before = pilot.tasks(100, 0, False)["train"].key, pilot.digest(100, 0, False)
    monkeypatch.setenv("SD15_PATH", "/somewhere")
    after = pilot.tasks(100, 0, False)["train"].key, pilot.digest(100, 0, False)
    assert after[0] != before[0]
    assert after[1] == before[1]


@pytest.mark.parametrize(
    ("name", "stage"),
    rotated_after(1, [(pilot.name, stage) for pilot in FULL for stage in reversed(pilot.stages)], release=3),
)
def test_commands_parse(name: str, stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = PILOTS[name].tasks(100, 0, quick=True)[stage]
    with pytest.raises(SystemExit) as ended:
        main([*task.command(tmp_path), "--print_config"])
    assert not ended.value.code, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage"), release_after(1, [(pilot.name, stage) for pilot in FULL for stage in ("train", "align")])
)
def test_trainings_fit_a_card_of_24_gb_and_three_days(name: str, stage: str, tmp_path: Path) -> None:
    pilot = PILOTS[name]
    arguments = pilot.tasks(pilot.pairs, 0, quick=False)[stage].command(tmp_path)[1:]
    found = training_needs(estimate_fit([one for one in arguments if "ckpt_path" not in one]), pilot.pairs)
    assert CARD / 2 < found.memory * ALLOWANCE + CONTEXT < CARD
    assert 1 < found.flops / 30e12 / 3600 < 36


@pytest.mark.slow
def test_the_four_test_sets_are_read_and_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("imagereward", "hpdv2", "hpdv3", "genai_bench"):
        monkeypatch.setenv(f"{name.upper()}_ROOT", str(ROOT / "tests" / "formats" / "data" / name))
    files = [f"--config={ROOT}/configs/pilot/shared/{name}.yaml" for name in ("four_test_sets", "tiny_published")]
    main(["benchmark", str(tmp_path / "report"), *files])
    report = read_config(tmp_path / "report" / "report.json")
    measured = {(one["benchmark"], one["protocol"]) for one in report["protocols"] if one["scorer"] == BESIDE}
    assert set(FOUR_BENCHMARKS.items()) <= measured
    assert [one["scorer"] for one in report["averages"]] == [BESIDE]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "tpu"}, "mine: device: it must be 'gpu' or 'cpu', not 'tpu'"),
        ({"stages": {"train": {"run": "fit"}}}, "mine: stages lacks cache, published, benchmark, align, judged"),
        ({"sources": {"A": {"licence": "MIT"}}}, "mine: sources.A: give either hub, for a model, or data"),
        ({"pears": 3}, "mine: pears: no setting has this name; did you mean 'pairs'"),
        ({"stages": {"train": {"rum": "fit"}}}, "mine: stages.train.rum: no setting has this name; did you mean 'run'"),
    ],
)
def test_a_wrong_file_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    content = {**load_yaml("configs/pilot/sd_tiny.yaml"), **change}
    (tmp_path / "mine.yaml").write_text(repr(content))
    with pytest.raises(InputError, match=re.escape(message)):
        read_pilot(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sd_15"], "name: there is neither a pilot nor a YAML file 'sd_15'; did you mean 'sd15'?"),
        ([], "name is missing; give it"),
        (["sd_tiny", "--hours=0"], "hours"),
        (["sd_tiny", "--pairs=0"], "pairs is 0; it must be at least 1"),
        (["nowhere.yaml"], "there is neither a pilot nor a YAML file 'nowhere.yaml'"),
    ],
)
def test_a_wrong_command_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["pilot", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": {"../../up": {"run": "fit"}}}, r"stages: '../../up' is not a name"),
        ({"stages": {"evil": {"run": "-s 'import os'", "module": "timeit"}}}, r"stages.evil.module is 'timeit'"),
        ({"stages": {"evil": {"run": "fit 'open"}}}, r"stages.evil.run: No closing quotation"),
        ({"stages": {"evil": {"run": 1}}}, r"stages.evil.run: it must be a text, not 1"),
        ({"stages": {"a": {"run": "fit {b}"}, "b": {"run": "fit {a}"}}}, r"stages: . needs . needs ."),
        ({"stages": None}, r"stages: it must be an object, not None"),
        ({"sources": [1]}, r"sources: it must be an object, not \[1\]"),
        ({"pairs": "many"}, "pairs: it must be a valid integer, not 'many'"),
        ({"name": "../../up"}, "name is that of the file"),
    ],
)
def test_a_strangers_file_runs_no_code_and_stays_in_its_folder(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    content = load_yaml("configs/pilot/sd_tiny.yaml")
    if isinstance(change.get("stages"), dict):
        change = {"stages": {**content["stages"], **change["stages"]}}
    (path := tmp_path / "theirs.yaml").write_text(yaml.safe_dump({**content, **change}))
    with pytest.raises(InputError, match=message):
        find_pilot(str(path)).tasks(64, 0, quick=True)


@pytest.mark.parametrize(
    "text", [b"a: [", b"\xff\xfe", b"a: !!python/object/apply:os.system [id]", b"a: 2001-99-99", b"1"]
)
def test_a_file_that_is_not_plain_yaml_is_one_line(text: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "theirs.yaml").write_bytes(text)
    with pytest.raises(InputError, match=r"^[^\n]*theirs(.yaml)?: [^\n]+$"):
        find_pilot(str(path))
