"""The released diffusion-rm cache in our layout."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentreward.apps.cli import main
from latentreward.data import DiffusionRMReader
from latentreward.data.images import decode_latents
from latentreward.diffusion.cache.sources import RELEASED_SPACE
from latentreward.diffusion.cache.store import IMAGES, PAIRS, read_plan
from tests.diffusion.cache.writing import stored, table

SAMPLE = Path(__file__).parents[2] / "formats" / "data" / "diffusion_rm"


def run_import(output: Path, root: Path, *settings: str) -> None:
    source = ["--reader=latentreward.data.DiffusionRMReader", f"--reader.root={root}", "--encoder=PublishedLatents"]
    main(["cache", str(output), *source, "--num_workers=0", "--device=cpu", *settings])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_latent_is_taken_over(tmp_path: Path, dtype: str) -> None:
    run_import(tmp_path, SAMPLE, f"--dtype={dtype}", "--images_per_shard=4")
    reader, plan = DiffusionRMReader(str(SAMPLE)), read_plan(tmp_path)
    assert (plan.pairs, plan.images, plan.spec.vae, plan.spec.origin) == (10, 20, None, "diffusion-rm")
    assert plan.spec.latent_space == RELEASED_SPACE
    images, latents = table(tmp_path, IMAGES), stored(tmp_path)
    assert {(image["height"], image["width"]) for image in images} == {(256, 256), (512, 512)}
    for number, pair in enumerate(table(tmp_path, PAIRS)):
        record = reader[number]
        assert (pair["pair_id"], pair["label_a"]) == (record.pair_id, record.label_a)
        for row, image in ((pair["image_a"], record.image_a), (pair["image_b"], record.image_b)):
            assert images[row]["image_key"] == image.image_key
            assert torch.equal(latents[row], torch.from_numpy(decode_latents(image)).to(getattr(torch, dtype)))


def test_damaged_latents_and_other_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(shutil.copytree(SAMPLE, tmp_path / "source"))
    held = pq.read_table(root / "part_rank00.parquet")
    first = held["latent1"].to_pylist()
    first[1] = first[1][:-9]
    columns = held.set_column(held.column_names.index("latent1"), "latent1", pa.array(first))
    with pq.ParquetWriter(root / "part_rank00.parquet", columns.schema) as writer:  # in the groups of the index
        writer.write_table(columns.slice(0, 2))
        writer.write_table(columns.slice(2))
    with pytest.raises(SystemExit):
        run_import(tmp_path / "cache", root)
    assert "latents 'part_rank00.parquet:1:latent1': truncated or damaged image" in capsys.readouterr().err
    run_import(tmp_path / "cache", root, "--reader.on_error=skip", "--images.buckets=[[256,256]]")
    dropped = read_plan(tmp_path / "cache").dropped
    assert dropped == {"truncated or damaged image": 1, "image in no bucket": 2}


def test_another_latent_space_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_import(tmp_path / "cache", SAMPLE, "--encoder.latent_space.channels=4")
    assert "correct encoder.latent_space" in capsys.readouterr().err
