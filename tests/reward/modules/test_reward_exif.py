"""A reward remembers how its training images were turned, and scores images that way once it is loaded."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from PIL import Image

from latentreward.core.errors import InputError
from latentreward.data import JSONLPairReader, PreferenceDataModule
from latentreward.reward import RewardModel
from tests.alignment.rewards.stored import write_run
from tests.data.rotated import photograph, upright, write_jsonl
from tests.marks import rotated_after
from tests.reward.modules.test_reward_module import lrm, trainer
from tests.tiny_pipelines import PIXELS, pipeline_folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path)


def data(own: Path, exif: Any) -> PreferenceDataModule:
    reader = JSONLPairReader(str(own), exif=exif)
    return PreferenceDataModule(PIXELS, train=reader, batch_size=2, num_workers=0, seed=0)


def run_beside(folder: Path, checkpoint: Path) -> Path:
    """A run's folder whose checkpoint is the given one."""
    write_run(folder, "lrm", "sd15")
    checkpoint.replace(folder / "reward.ckpt")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("exif", rotated_after(1, ["apply", "ignore"]))
def test_training_checkpoint_and_folder_agree_on_exif(own: Path, exif: Any, tmp_path: Path) -> None:
    module, run = lrm(), trainer(max_steps=1)
    assert module.model.exif == "apply"
    run.fit(module, data(own, exif))
    assert module.model.exif == exif
    run.save_checkpoint(tmp_path / "new.ckpt")
    model = RewardModel.from_pretrained(run_beside(tmp_path / "run", tmp_path / "new.ckpt"))
    model.save_pretrained(tmp_path / "folder")
    again = RewardModel.from_pretrained(tmp_path / "folder", base=pipeline_folder("sd15"))
    assert (model.exif, again.exif) == (exif, exif)
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["exif"] == exif
    card = (tmp_path / "folder" / "README.md").read_text()
    assert ("applied" if exif == "apply" else "ignored") in card.split("EXIF orientation of images")[1][:20]
    seen = upright(photograph()) if exif == "apply" else photograph_as_stored()
    assert torch.equal(again.score("a cat", photograph()), again.score("a cat", seen))


def photograph_as_stored() -> Any:
    """Without the tag."""
    return Image.fromarray(np.array(Image.open(io.BytesIO(photograph()))))


@pytest.mark.parametrize("value", rotated_after(1, ["perhaps", None, ["apply"], torch.zeros(2)]), ids=str)
def test_another_value_in_a_checkpoint_is_refused(value: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run", "lrm", "sd15")
    checkpoint = tmp_path / "run" / "reward.ckpt"
    torch.save({**torch.load(checkpoint), "exif": value}, checkpoint)
    with pytest.raises(InputError, match=f"{checkpoint.name}: exif: it must be 'apply' or 'ignore', not .*$") as error:
        RewardModel.from_pretrained(tmp_path / "run")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="it must be 'apply' or 'ignore'"):
        lrm().on_load_checkpoint(torch.load(checkpoint))


def test_a_search_for_the_learning_rate_is_no_resume(own: Path, tmp_path: Path, caplog: Any) -> None:
    finder = LearningRateFinder(num_training_steps=2, update_attr=False)
    module = lrm()
    trainer(max_steps=1, default_root_dir=tmp_path, callbacks=[finder]).fit(module, data(own, "ignore"))
    assert not any(record.message.startswith("resume: ") for record in caplog.records)
    assert module.model.exif == "ignore"
