"""A reward remembers how its training images were turned and resized, and scores images that way."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from PIL import Image
from torch.utils.data import DataLoader, Subset

from latentreward.core.contracts import ImageRef
from latentreward.core.errors import InputError
from latentreward.data import JSONLPairReader, PixelLoader, PreferenceDataModule, collate_pairs
from latentreward.data.image_sizes import ImageSizes, NearestBucket, OneSize
from latentreward.diffusion.cache.datamodule import CachedPairDataset, CacheIndex
from latentreward.reward import RewardModel
from tests.alignment.modules.batches import MODULES
from tests.alignment.rewards.stored import write_run
from tests.data.rotated import photograph, upright, write_jsonl
from tests.diffusion.cache.written_caches import spec, write_cache
from tests.marks import rotated_after
from tests.reward.modules.test_reward_module import lrm, trainer
from tests.tiny_pipelines import PIXELS, pipeline_folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path)


def exif_data(own: Path, exif: Any) -> PreferenceDataModule:
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
    run.fit(module, exif_data(own, exif))
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
    trainer(max_steps=1, default_root_dir=tmp_path, callbacks=[finder]).fit(module, exif_data(own, "ignore"))
    assert not any(record.message.startswith("resume: ") for record in caplog.records)
    assert module.model.exif == "ignore"


SIZE = (16, 24)


def data(own: Path, size: Any = SIZE, resize: Any = "center_crop", splits: tuple[str, ...] = ("train",)) -> Any:
    readers = {split: JSONLPairReader(str(own)) for split in splits}
    return PreferenceDataModule(
        size, **readers, resize=resize, shared_prompts="keep", batch_size=2, num_workers=0, seed=0
    )


def trained(folder: Path, method: str, name: str, data: Any) -> Path:
    """A run of one step: config and checkpoint."""
    module, run = MODULES[method](name), trainer(max_steps=1)
    run.fit(module, data)
    write_run(folder, method, name)
    run.save_checkpoint(folder / "reward.ckpt")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name", "resize"),
    rotated_after(1, [("lrm", "sd15", "center_crop"), ("lrm", "sd15", "stretch"), ("dina", "sd35", "stretch")]),
)
def test_scores_are_those_of_images_resized_as_in_training(
    method: str, name: str, resize: Any, own: Path, tmp_path: Path
) -> None:
    model = RewardModel.from_pretrained(trained(tmp_path / "run", method, name, data(own, resize=resize)))
    model.save_pretrained(tmp_path / "folder")
    again = RewardModel.from_pretrained(tmp_path / "folder", base=pipeline_folder(name))
    assert model.image_sizes == again.image_sizes == OneSize(*SIZE, resize)
    pixels = PixelLoader(*SIZE, resize, exif="apply")(ImageRef("photo", data=photograph()))
    seen = again.score("a cat", pixels[None], value_range=(-1, 1))
    assert torch.equal(again.score("a cat", photograph()), seen)
    assert torch.equal(model.score("a cat", photograph()), seen)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert f"16x24{'' if resize == 'stretch' else ' center-cropped'} |" in card


BUCKETS = ((16, 16), (16, 32))


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"size": (16, 24)}, OneSize(16, 24, "center_crop")),
        ({"size": (16, 24), "resize": "stretch"}, OneSize(16, 24)),
        ({"buckets": BUCKETS}, NearestBucket(BUCKETS)),
        ({"buckets": BUCKETS, "resize": "stretch"}, NearestBucket(BUCKETS, "stretch")),
        ({"size": (16, 24), "frames": 5, "fps": 8.0}, OneSize(16, 24, "center_crop", 5, 8.0)),
    ],
)
def test_a_cache_tells_how_its_images_were_resized(settings: dict[str, Any], sizes: ImageSizes, tmp_path: Path) -> None:
    for origin, rule in (("vae", sizes), ("diffusion-rm", None)):
        one = spec(images=settings, origin=origin)
        folder = write_cache(tmp_path / origin, [{"image_a": 0, "image_b": 1}], [(16, 24)] * 2, spec=one)
        assert CachedPairDataset(CacheIndex(folder), [0]).image_sizes == rule
    assert sizes.loader(16, 24).resize == settings.get("resize", "center_crop")


@pytest.mark.slow
def test_another_size_is_said(own: Path, tmp_path: Path, caplog: Any) -> None:
    checkpoint = trained(tmp_path / "run", "lrm", "sd15", data(own)) / "reward.ckpt"
    module = lrm()
    trainer(max_steps=2, max_epochs=9).fit(module, data(own), ckpt_path=checkpoint)
    splits = ("val", "test", "predict")
    for command in ("validate", "test", "predict"):
        getattr(trainer(), command)(lrm(), data(own, splits=splits), ckpt_path=checkpoint)
    assert not said(caplog)
    for command in ("validate", "test", "predict"):
        getattr(trainer(), command)(lrm(), data(own, 16, splits=splits), ckpt_path=checkpoint)
        [line] = said(caplog)
        assert line == (
            f"{command}: the reward was trained with image sizes: 16x24 center-cropped, the data now have image sizes: "
            "16x16 center-cropped; set data.size and data.resize, or the cache's images, to keep to the training"
        )
        caplog.clear()
    trainer(max_steps=2, max_epochs=9).fit(module, data(own, 16), ckpt_path=checkpoint)
    assert said(caplog)[0].startswith("resume: ")
    assert module.model.image_sizes == OneSize(16, 16, "center_crop")


def test_a_part_of_a_data_set_has_its_sizes(own: Path) -> None:
    module, source = lrm(), data(own)
    source.setup("fit")
    part = Subset(source.datasets["train"], [0, 1])
    trainer(max_steps=1).fit(module, DataLoader(part, batch_size=2, collate_fn=collate_pairs))
    assert module.model.image_sizes == OneSize(*SIZE, "center_crop")


def said(caplog: Any) -> list[str]:
    return [record.message for record in caplog.records if "image sizes" in record.message]
