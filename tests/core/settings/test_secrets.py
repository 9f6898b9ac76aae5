"""A variable whose name says that it is a secret is used, and written nowhere."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from latentreward.apps.cli import main
from latentreward.core.errors import InputError
from latentreward.core.settings.functions import prepare_parsing, run_function, with_secrets
from latentreward.core.settings.rewriting import hide_secrets
from latentreward.reward import RewardModel
from tests.core.settings.test_refusals import FIT, refusal

LOGGER = """
trainer:
  logger:
    - class_path: lightning.pytorch.loggers.CSVLogger
      init_args: {save_dir: run, name: "name-${oc.env:MY_TOKEN}", prefix: "${oc.env:PLAIN}"}
    - class_path: lightning.pytorch.loggers.TensorBoardLogger
      init_args: {save_dir: board, name: "${oc.env:PLAIN}", comment: "${oc.env:MY_TOKEN}"}
"""


@pytest.mark.slow
def test_a_secret_is_used_and_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_TOKEN", "s3cr3t")
    monkeypatch.setenv("PLAIN", "plain")
    Path("logger.yaml").write_text(LOGGER)
    small = ["--data.train_pairs=8", "--data.val_pairs=4", "--trainer.max_steps=1", "--trainer.limit_val_batches=1"]
    main([*FIT, *small, "--config=logger.yaml", "--trainer.fast_dev_run=false"])
    (folder,) = Path("run").iterdir()
    assert folder.name == "name-s3cr3t"
    # Checkpoints hold the path of their folder, which this setting named.
    texts = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".ckpt"}
    assert not [path for path, text in texts.items() if b"s3cr3t" in text]
    assert list(Path("board").rglob("hparams.yaml"))
    assert list(Path("board").rglob("events.out.*"))
    (config,) = [path for path in texts if path.name == "config.yaml"]
    assert "name-${oc.env:MY_TOKEN}" in config.read_text()
    assert "prefix: plain" in config.read_text()
    monkeypatch.delenv("MY_TOKEN")
    line = refusal(capsys, "fit", f"--config={config}")
    assert "logger[0].name: the environment variable MY_TOKEN is not set; say MY_TOKEN=VALUE" in line
    main(["validate", f"--config={config}", "--trainer.logger=false", "--trainer.limit_val_batches=1"])
    assert isinstance(RewardModel.from_pretrained(folder), RewardModel)


@pytest.mark.parametrize(
    "name", ["hf_token", "DB_PASS", "MYSQL_PWD", "GH_PAT", "AWS_CREDENTIALS", "AUTH", "Cookie", "session_id"]
)
def test_every_name_of_a_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "s3cr3t")
    monkeypatch.setenv("PLAIN", name)
    prepare_parsing([])
    for text in (f"${{oc.env:{name}}}", "${oc.env:${oc.env:PLAIN}}", "${oc.env:${oc.env:PLAIN},x}"):
        kept = OmegaConf.to_container(OmegaConf.create([hide_secrets(text)]), resolve=True)[0]
        assert "s3cr3t" not in kept
        assert with_secrets(kept) == "s3cr3t"


@pytest.mark.parametrize("name", ["SD35_PATH", "PATTERN", "DATA_ROOT"])
def test_other_variables_are_written(name: str) -> None:
    assert hide_secrets(f"${{oc.env:{name}}}") == f"${{oc.env:{name}}}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${oc.env:MY_TOKEN}", "s3cr3t"),
        ("${oc.env: MY_TOKEN}", "s3cr3t"),
        ("${oc.env:MY_TOKEN,${oc.env:PLAIN}}", "s3cr3t"),
        ("${oc.env:NO_KEY,null}", None),
        ("${oc.env:NO_KEY,7}", "7"),
        ("${oc.env:NO_KEY,${oc.env:MY_TOKEN}}", "s3cr3t"),
    ],
)
def test_every_form_of_a_secret(text: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cr3t")
    monkeypatch.setenv("PLAIN", "plain")
    prepare_parsing([])
    kept = OmegaConf.to_container(OmegaConf.create([hide_secrets(text)]), resolve=True)[0]
    assert "s3cr3t" not in kept
    assert with_secrets(kept) == value


def test_secrets_in_mappings_and_tuples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cr3t")
    told: list[object] = []

    def command(headers: dict[str, list[dict[str, str]]], login: tuple[str, str]) -> None:
        """Run.

        Args:
            headers: Headers.
            login: Name and password.
        """
        told.extend([headers, login])

    settings = ["--headers={x: [{auth: '${oc.env:MY_TOKEN}'}]}", "--login=[me, '${oc.env:MY_TOKEN}']"]
    run_function(command, "command", settings, classes=False)
    assert told == [{"x": [{"auth": "s3cr3t"}]}, ("me", "s3cr3t")]
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(InputError, match=r"^headers\.x\[0\]\.auth: the environment variable MY_TOKEN is not set"):
        run_function(command, "command", settings, classes=False)
