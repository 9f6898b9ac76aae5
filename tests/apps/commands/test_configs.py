"""``latentreward configs``: lists the shipped YAML files, prints one; docs/configs.md names them all."""

import re
from pathlib import Path

import pytest
import yaml

from latentreward.apps.cli import main
from tests.core.settings.test_refusals import refusal

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = {path.relative_to(ROOT / "configs").as_posix(): path for path in (ROOT / "configs").rglob("*.yaml")}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def listed(capsys: pytest.CaptureFixture[str], *name: str) -> dict[str, str]:
    """Name of each file -> what the list says of it."""
    main(["configs", *name])
    kind, found = "", {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith(" "):
            file, summary = line.split(maxsplit=1)
            found[kind + file] = summary
        else:
            kind = line
    return found


def test_every_shipped_file_is_listed_with_what_it_is(capsys) -> None:
    found = listed(capsys)
    assert set(found) == set(SHIPPED)
    assert all(0 < len(re.sub(r" \[.*", "", text)) <= 130 for text in found.values())
    assert found["model/lrm_sd15.yaml"] == "LRM-SD1.5: the whole down path, mid block and text encoder train"
    assert found["data/pickapic_v1.yaml"] == "Pick-a-Pic v1, about 202 GB of parquet [PICKAPIC_ROOT]"


@pytest.mark.parametrize("name", ["model/lrm_sd15.yaml", "configs/recipes/lrm_hpdv2.yaml"])
def test_one_file(name: str, capsys) -> None:
    main(["configs", name])
    assert capsys.readouterr().out == SHIPPED[name.removeprefix("configs/")].read_text()


def test_an_unknown_name_is_refused(capsys) -> None:
    line = refusal(capsys, "configs", "model/lrm_tinny.yaml")
    assert line == "name: no shipped file 'model/lrm_tinny.yaml'; did you mean 'model/lrm_tiny.yaml'?"
    assert "`latentreward configs` lists" in refusal(capsys, "fit", "--config=zzz.yaml")


def test_the_page_names_every_file() -> None:
    page = (ROOT / "docs" / "configs.md").read_text()
    kinds = re.findall(r"^\| `(\w+)/` \|.*\|([^|]*)\|$", page, flags=re.MULTILINE)
    named = [f"{kind}/{name}.yaml" for kind, names in kinds for name in re.findall(r"`(\w+)`", names)]
    assert sorted(named) == sorted(SHIPPED)


def composed(capsys: pytest.CaptureFixture[str], *names: str) -> str:
    main(["configs", "--compose", *names])
    return capsys.readouterr().out


def test_a_policy_hardware_and_a_method_make_one_file(capsys) -> None:
    text = composed(capsys, "flux2_klein", "nft", "one_gpu")
    run = yaml.safe_load(text)
    assert list(run) == ["model", "data", "trainer"]
    assert run["model"]["class_path"] == "latentreward.alignment.DiffusionNFTModule"
    arguments, trainer = run["model"]["init_args"], run["trainer"]
    assert arguments["policy"]["source"] == "${oc.env:FLUX2_KLEIN_PATH,black-forest-labs/FLUX.2-klein-base-4B}"
    assert arguments["guidance_scale"] is None  # the method's, over the policy's 4
    assert arguments["reward"]["init_args"]["path"] == "${oc.env:REWARD_PATH}"
    assert trainer["devices"] == 1  # the hardware's, over the policy's 4
    assert trainer["logger"]["init_args"]["name"] == "nft"
    kept = [one["class_path"].rpartition(".")[2] for one in trainer["callbacks"]]
    assert len(kept) == len({*kept}) and {"TrainableEMA", "PolicyLoRA", "LearningRateMonitor", "LastCheckpoint"} <= {
        *kept
    }
    (last,) = [one for one in trainer["callbacks"] if one["class_path"].endswith("LastCheckpoint")]
    assert last["init_args"]["every_n_train_steps"] == 50  # the method's, not the 200 of one_gpu.yaml
    head = text[: text.index("\nmodel:")]
    assert "#   export REWARD_PATH=… PROMPTS=…\n" in head and all(line.startswith("#") for line in head.splitlines())
    for file in ("policy/flux2_klein", "trainer/one_gpu", "method/nft"):
        assert f"--config configs/{file}.yaml" in head and SHIPPED[f"{file}.yaml"].read_text().splitlines()[0] in head
    assert text == composed(capsys, "flux2_klein", "nft", "one_gpu")


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["--compose", "flux", "nft"], "policy: no file 'flux'"),
        (["--compose", "flux1", "nfft"], "method: no file 'nfft'"),
        (["--compose", "sd16", "nft"], "policy: no file 'sd16' of configs/policy; did you mean 'sd15'?"),
        (["--compose", "sd15", "nft"], "method: nft is for flows, and sd15 predicts noise"),
        (["--compose", "flux1", "nft", "two"], "hardware: no file 'two'"),
        (["--compose", "flux1"], "method: "),
        (["flux1", "nft"], "method: 'nft' is for --compose"),
    ],
)
def test_unknown_parts_are_refused(names: list[str], line: str, capsys) -> None:
    assert refusal(capsys, "configs", *names).startswith(line)
