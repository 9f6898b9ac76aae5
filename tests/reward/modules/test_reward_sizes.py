"""A reward remembers the size to which its training images were resized, and scores images at that size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from latentreward.core.contracts import ImageRef
from latentreward.core.errors import InputError
from latentreward.data import JSONLPairReader, PixelLoader, PreferenceDataModule, collate_pairs
from latentreward.data.image_sizes import ImageSizes, NearestBucket, OneSize
from latentreward.diffusion.cache.datamodule import CachedPairDataset, CacheIndex
from latentreward.reward import RewardModel
from tests.alignment.modules.batches import MODULES
from tests.alignment.rewards.stored import write_run
from tests.data.rotated import photograph, write_jsonl
from tests.diffusion.cache.written_caches import spec, write_cache
from tests.marks import rotated_after
from tests.reward.modules.test_reward_module import lrm, trainer
from tests.tiny_pipelines import pipeline_folder

SIZE = (16, 24)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path)


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


def test_a_strangers_checkpoint_with_another_rule_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "lrm", "sd15")
    content = torch.load(tmp_path / "run" / "reward.ckpt", weights_only=True)
    content["image_sizes"] = {"class": "os.system", "init_args": {}}
    torch.save(content, tmp_path / "run" / "reward.ckpt")
    with pytest.raises(InputError, match=r"reward.ckpt: image_sizes: unknown class 'os.system'"):
        RewardModel.from_pretrained(tmp_path / "run")


def said(caplog: Any) -> list[str]:
    return [record.message for record in caplog.records if "image sizes" in record.message]
