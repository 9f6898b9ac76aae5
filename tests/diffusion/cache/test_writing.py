"""What ``latentreward cache`` writes, from data set to files."""

import json
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentreward.apps.cli import main
from latentreward.core.contracts import ImageRef, PreferencePair
from latentreward.core.errors import InputError
from latentreward.core.seeding import pair_generator
from latentreward.core.storage.durable import TEMPORARY_NAME
from latentreward.core.storage.progress import Progress
from latentreward.data import HPDv3Reader, PairReader, PixelLoader
from latentreward.diffusion.backbones.loading import PipelineSource, tiny_pipeline
from latentreward.diffusion.cache import encoding
from latentreward.diffusion.cache.dataset import CachedPairDataset
from latentreward.diffusion.cache.index import CacheIndex
from latentreward.diffusion.cache.layout import (
    IMAGES,
    PAIRS,
    PROMPTS,
    SCHEMAS,
    SHARDS,
    manifest_name,
    read_manifest,
    read_plan,
)
from latentreward.diffusion.cache.plan import describe_data
from latentreward.diffusion.cache.sources import PipelineEncoders
from tests.core.storage.test_progress import Terminal
from tests.data.rotated import photograph, upright, write_jsonl
from tests.diffusion.cache.writing import (
    LARGE,
    SETTINGS,
    SQUARE,
    TALL,
    WIDE,
    cache_arguments,
    contents,
    row,
    run_cache,
    write_data,
    write_image,
    write_rows,
)
from tests.diffusion.families.twins import TWINS
from tests.marks import rotated_after
from tests.processes import start_ranks
from tests.tiny_pipelines import pipeline_folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set and its cache, with text."""
    folder = tmp_path_factory.mktemp("written")
    data = write_data(folder / "data")
    run_cache(folder / "cache", data, "--encoder.text=true", "--encoder.prompts_per_shard=4", "--dtype=float32")
    return data, folder / "cache"


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / name).to_pylist()


def latents(folder: Path, image: dict[str, Any]) -> torch.Tensor:
    """Cached latents of one row of the images' table."""
    shard = table(folder, SHARDS)[image["shard"]]
    return load_file(folder / shard["name"])["latents"][image["row"]]


def test_every_pair_and_every_image_is_there_once(written: tuple[Path, Path]) -> None:
    data, cache = written
    reader, images, pairs = HPDv3Reader(str(data), "train"), table(cache, IMAGES), table(cache, PAIRS)
    prompts = table(cache, PROMPTS)
    assert [pair["pair_id"] for pair in pairs] == [reader[index].pair_id for index in range(len(reader))]
    for number, pair in enumerate(pairs):
        record = reader[number]
        assert images[pair["image_a"]]["image_key"] == record.image_a.image_key
        assert images[pair["image_b"]]["image_key"] == record.image_b.image_key
        assert prompts[pair["prompt"]]["prompt"] == record.prompt
        assert (pair["label_a"], (pair["votes_a"], pair["votes_b"])) == (record.label_a, record.votes)
    keys = [(image["image_key"], image["height"], image["width"]) for image in images]
    assert len(keys) == len(set(keys)) == 20
    places = [(image["shard"], image["row"]) for image in images]
    assert len(set(places)) == len(places)
    assert [name.to_string() for name in SCHEMAS.values()] == [
        pq.read_schema(cache / name).to_string() for name in SCHEMAS
    ]


def test_a_shard_has_one_shape_and_batches_stay_inside(written: tuple[Path, Path]) -> None:
    cache = written[1]
    plan, images = read_plan(cache), table(cache, IMAGES)
    for number, shard in enumerate(table(cache, SHARDS)):
        manifest = read_manifest(cache / manifest_name(shard["name"]))
        assert (manifest.count, manifest.plan_hash, manifest.unreadable) == (shard["count"], plan.hash, {})
        if shard["kind"] == "text":
            continue
        held = [image for image in images if image["shard"] == number]
        assert {(image["height"], image["width"]) for image in held} == {(shard["height"], shard["width"])}
        assert sorted(image["row"] for image in held) == list(range(shard["count"]))
        assert all(image["batch"] == image["row"] // plan.spec.batch_size for image in held)
        tensors = load_file(cache / shard["name"])
        assert tensors.keys() == {"latents"}
        assert tensors["latents"].shape == (shard["count"], 4, shard["height"] // 4, shard["width"] // 4)


def test_shards_are_numbered_as_a_row_s_prompt_and_images_come(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", pairs=3, sizes=[SQUARE])
    run_cache(tmp_path / "cache", data, "--encoder.text=true", "--encoder.prompts_per_shard=1", "--images_per_shard=1")
    names = [shard["name"].removesuffix(".safetensors") for shard in table(tmp_path / "cache", SHARDS)]
    images = [f"latents/0032x0032-0000{number}" for number in range(6)]
    assert names == ["text/00000", "text/00001", *images[:4], "text/00002", *images[4:]]


def test_latents_are_the_encoder_s_own(written: tuple[Path, Path]) -> None:
    data, cache = written
    encoder = PipelineSource(tiny_pipeline("sd_tiny")).latent_encoder()
    for image in table(cache, IMAGES)[:6]:
        key, size = image["image_key"], (image["height"], image["width"])
        reference = ImageRef(key, path=data / "images" / Path(key).name)
        pixels = PixelLoader(*size, "center_crop")(reference).unsqueeze(0)
        noise = torch.randn(4, size[0] // 4, size[1] // 4, generator=pair_generator(0, "posterior", 0, "", key))
        expected = encoder.encode(pixels, noise.unsqueeze(0))[0]
        torch.testing.assert_close(latents(cache, image), expected, atol=1e-5, rtol=1e-5)


def test_embeddings_are_the_text_encoder_s_own(written: tuple[Path, Path]) -> None:
    cache = written[1]
    encoder = PipelineSource(tiny_pipeline("sd_tiny")).clip_prompts()
    prompts, shards = table(cache, PROMPTS), table(cache, SHARDS)
    assert prompts[0]["prompt"] == ""
    assert len({prompt["prompt"] for prompt in prompts}) == len(prompts) == 7
    for prompt in prompts:
        tensors = load_file(cache / shards[prompt["shard"]]["name"])
        expected = encoder([prompt["prompt"]])
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            torch.testing.assert_close(tensors[name][prompt["row"]], getattr(expected, name)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_type_mode_and_one_size(written: tuple[Path, Path], tmp_path: Path, dtype: str) -> None:
    data = written[0]
    settings = ["--images.buckets=null", "--images.size=32", "--images.min_pixels=null", "--images.resize=stretch"]
    run_cache(tmp_path / "cache", data, f"--dtype={dtype}", "--encoder.posterior=mode", *settings)
    images, encoder = table(tmp_path / "cache", IMAGES), PipelineSource(tiny_pipeline("sd_tiny")).latent_encoder()
    assert {(image["height"], image["width"]) for image in images} == {(32, 32)}
    assert all(prompt["shard"] is None for prompt in table(tmp_path / "cache", PROMPTS))
    image = images[5]
    pixels = PixelLoader(32, 32, "stretch")(ImageRef("", path=data / "images" / Path(image["image_key"]).name))
    found = latents(tmp_path / "cache", image)
    assert found.dtype == getattr(torch, dtype)
    torch.testing.assert_close(found.float(), encoder.encode(pixels[None])[0], atol=0.02, rtol=0.02)


def test_a_pair_across_buckets_has_entries_of_its_own(tmp_path: Path) -> None:
    for number, size in enumerate((SQUARE, SQUARE, LARGE, TALL)):
        write_image(tmp_path / f"images/{number}.jpg", number, size)
    small, small_2, large, tall = (f"images/{number}.jpg" for number in range(4))
    rows = [row("a", small, small_2), row("b", small, large), row("c", small, tall)]
    run_cache(tmp_path / "cache", write_rows(tmp_path, rows))
    images, pairs = table(tmp_path / "cache", IMAGES), table(tmp_path / "cache", PAIRS)
    sizes = [(image["image_key"], image["height"]) for image in images]
    assert len(pairs) == 2
    assert sorted(sizes) == [(small, 32), (small_2, 32), (large, 32)]  # 45 × 45 on average, in log area nearer to 32
    assert read_plan(tmp_path / "cache").dropped == {"images of different aspect ratio": 1}
    run_cache(tmp_path / "other", tmp_path, "--images.cross_bucket=drop")
    assert read_plan(tmp_path / "other").dropped == {"images in different buckets": 2}


@pytest.mark.parametrize("settings", [("--images.buckets=null", "--images.size=32"), ()], ids=["size", "buckets"])
@pytest.mark.parametrize("on_error", rotated_after(1, ["raise", "skip", "placeholder"]))
def test_images_that_cannot_be_read(
    tmp_path: Path, on_error: str, settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", sizes=[SQUARE])
    whole = (data / "images/3b.jpg").read_bytes()
    (data / "images/3b.jpg").write_bytes(whole[:-40])  # its header is whole
    options = (f"--reader.on_error={on_error}", "--images.min_pixels=null" if settings else "--images.min_pixels=0")
    if on_error == "raise":
        with pytest.raises(SystemExit):
            run_cache(tmp_path / "cache", data, *options, *settings)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "image 'images/3b.jpg': truncated or damaged image" in error
        assert error.endswith("replace the file, or set the reader's on_error to skip, and run the same command")
        assert not list((tmp_path / "cache").rglob("*.partial"))
        return
    run_cache(tmp_path / "cache", data, *options, *settings)
    told = "images not read: 1 truncated or damaged image ('images/3b.jpg'); 1 pairs have such an image"
    assert told in capsys.readouterr().out
    [image] = [image for image in table(tmp_path / "cache", IMAGES) if image["image_key"] == "images/3b.jpg"]
    shard = table(tmp_path / "cache", SHARDS)[image["shard"]]["name"]
    manifest = read_manifest(tmp_path / "cache" / manifest_name(shard))
    assert manifest.unreadable == {image["row"]: "truncated or damaged image"}
    assert latents(tmp_path / "cache", image).abs().max() == 0
    (data / "images/3b.jpg").write_bytes(whole)
    run_cache(tmp_path / "whole", data, *options, *settings)
    for other in table(tmp_path / "cache", IMAGES):  # its neighbours do not notice
        if other["image_key"] != "images/3b.jpg":
            assert torch.equal(latents(tmp_path / "cache", other), latents(tmp_path / "whole", other))


def test_an_image_without_header_is_dropped_in_planning(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", sizes=[SQUARE])
    (data / "images/3b.jpg").write_bytes(b"not an image")
    run_cache(tmp_path / "cache", data, "--reader.on_error=skip")
    assert read_plan(tmp_path / "cache").dropped == {"unknown image format": 1}
    with pytest.raises(SystemExit):
        run_cache(tmp_path / "other", data)


@pytest.mark.slow
def test_workers_and_threads_do_not_change_a_byte(written: tuple[Path, Path], tmp_path: Path) -> None:
    data, cache = written
    settings = ("--encoder.text=true", "--encoder.prompts_per_shard=4", "--dtype=float32")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    run_cache(tmp_path / "cache", data, *settings, "--num_workers=2")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert contents(tmp_path / "cache") == contents(cache)


def test_ctrl_c_keeps_finished_shards(
    written: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, cache = written
    settings = ("--encoder.text=true", "--encoder.prompts_per_shard=4", "--dtype=float32")
    own, calls = encoding.encode_batch, []

    def interrupted(*arguments: Any) -> dict[str, torch.Tensor]:
        calls.append(arguments)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return own(*arguments)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_batch", interrupted)
        with pytest.raises(SystemExit) as stop:
            run_cache(tmp_path / "cache", data, *settings)
    assert stop.value.code == 130
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", Terminal())
        with Progress("score", 2, "images"):
            pass
        assert "0/2" in sys.stderr.getvalue().split("\r")[-1]  # a nested display would be cleared at its end
    kept = f"finished shards are kept in {tmp_path / 'cache'}: the same command goes on there"
    assert f"latentreward: stopped by Ctrl-C; {kept}\n" in capsys.readouterr().err
    assert list((tmp_path / "cache").rglob("*.json"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if TEMPORARY_NAME.fullmatch(path.name)]
    run_cache(tmp_path / "cache", data, *settings)
    assert contents(tmp_path / "cache") == contents(cache)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(written: tuple[Path, Path], tmp_path: Path) -> None:
    settings = ("--encoder.text=true", "--encoder.prompts_per_shard=4", "--dtype=float32")
    two = ("--trainer.devices=2", "--trainer.strategy=ddp")
    for run in start_ranks(cache_arguments(tmp_path / "cache", written[0], *settings, *two), 2, threads=2):
        assert run.wait(300) == 0, run.stderr
        assert "Traceback" not in run.stderr
    assert contents(tmp_path / "cache") == contents(written[1])


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_another_vae_is_refused_unless_only_its_decoder_differs(
    written: tuple[Path, Path], tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_pipeline("sd_tiny"), tmp_path / "pipeline"))
    [weights] = (folder / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    tensors[f"{part}.conv_in.bias"][0] += 0.01
    save_file(tensors, weights)
    cache = Path(shutil.copytree(written[1], tmp_path / "cache"))
    settings = ("--encoder.text=true", "--encoder.prompts_per_shard=4", "--dtype=float32", f"--encoder.source={folder}")
    if part == "decoder":
        run_cache(cache, written[0], *settings)
        assert contents(cache) == contents(written[1])
        return
    with pytest.raises(SystemExit):
        run_cache(cache, written[0], *settings)
    assert 'was begun with encoder.vae "' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("--encoder.source=sd35_tiny", 'encoder.text.fingerprint "'),  # its VAE is the same
        ("--images.resize=stretch", 'images.resize "center_crop", now it is "stretch"'),
        ("--images.buckets=[[32,32]]", "images.buckets [["),
        ("--seed=1", "seed 0, now it is 1"),
        ("--dtype=float16", 'dtype "float32", now it is "float16"'),
        ("--encoder.batch_size=2", "encoder.batch_size 4, now it is 2"),
        ("--encoder.text=false", 'encoder.text {"'),
        ("--reader.min_confidence=0.5", 'data.sample "'),
        ("--reader.exif=apply", 'reader.exif "ignore", now it is "apply"'),
    ],
)
def test_other_settings_are_refused(
    written: tuple[Path, Path], tmp_path: Path, setting: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, cache = written
    if "confidence" in setting:
        data = write_data(tmp_path / "data", sizes=[TALL, TALL, SQUARE])
        rows = json.loads((data / "train.json").read_text())
        write_rows(data, [{**one, "prompt": f"other {one['prompt']}"} for one in rows])
    before = contents(cache)
    settings = ("--encoder.text=true", "--encoder.prompts_per_shard=4", "--dtype=float32", setting)
    with pytest.raises(SystemExit):
        run_cache(cache, data, *settings)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{cache} was begun with {field}" in error
    assert error.endswith("set it back, or choose another output")
    assert contents(cache) == before


def own_cache(output: Path, file: Path, *settings: str) -> None:
    reader = ("--reader=latentreward.data.JSONLPairReader", f"--reader.file={file}")
    main(["cache", str(output), *SETTINGS[2:], *reader, "--dtype=float32", *settings])


def test_photographs_are_cached_upright_and_the_cache_says_so(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path)
    for exif, shape in (("apply", TALL), ("ignore", WIDE)):
        cache = tmp_path / exif
        own_cache(cache, file, f"--reader.exif={exif}")
        assert read_plan(cache).spec.exif == exif
        assert {(image["height"], image["width"]) for image in table(cache, IMAGES)} == {shape}
    own_cache(tmp_path / "default", file)
    assert contents(tmp_path / "default") == contents(tmp_path / "apply")
    encoder = PipelineSource(tiny_pipeline("sd_tiny")).latent_encoder()
    [image] = [image for image in table(tmp_path / "apply", IMAGES) if image["image_key"] == "0a.jpg"]
    pixels = PixelLoader(*TALL, "center_crop").pixels(upright(photograph(seed=0)))
    noise = torch.randn(4, 12, 8, generator=pair_generator(0, "posterior", 0, "", "0a.jpg"))
    torch.testing.assert_close(latents(tmp_path / "apply", image), encoder.encode(pixels[None], noise[None])[0])


def test_a_cache_goes_on_only_with_its_own_exif(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path)
    own_cache(tmp_path / "cache", file, "--reader.exif=ignore")
    before = contents(tmp_path / "cache")
    main(["cache", str(tmp_path / "cache"), "--check"])
    shard = next(iter(table(tmp_path / "cache", SHARDS)))["name"]
    for path in (manifest_name(shard), PAIRS):  # encodes one shard again, and plans again
        (tmp_path / "cache" / path).unlink()
    own_cache(tmp_path / "cache", file, "--reader.exif=ignore")
    assert contents(tmp_path / "cache") == before
    capsys.readouterr()
    with pytest.raises(SystemExit):
        own_cache(tmp_path / "cache", file)
    [line] = capsys.readouterr().err.strip().splitlines()
    assert 'was begun with reader.exif "ignore", now it is "apply"; set it back' in line
    assert contents(tmp_path / "cache") == before


def test_other_labels_are_other_data(written: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, read = HPDv3Reader(str(written[0]), "train"), HPDv3Reader.__getitem__
    before = describe_data(reader)
    assert describe_data(reader) == before
    monkeypatch.setattr(HPDv3Reader, "__getitem__", lambda self, row: replace(read(self, row), label_a=0.25))
    assert describe_data(reader) != before


def test_a_row_that_changed_since_planning_is_found(
    written: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(written[0], tmp_path / "data"))
    rows = json.loads((data / "train.json").read_text())
    rows = [row(f"{index}", f"images/{index % 12}a.jpg", f"images/{index % 12}b.jpg") for index in range(100)]
    rows = [{**one, "prompt": one["prompt"]} for one in rows]
    write_rows(data, rows)
    run_cache(tmp_path / "cache", data)
    rows[1]["path1"] = "images/5a.jpg"  # not among the rows that are compared at the start
    write_rows(data, rows)
    for path in (tmp_path / "cache/latents").iterdir():
        path.unlink()
    with pytest.raises(SystemExit):
        run_cache(tmp_path / "cache", data)
    assert "but was 'images/1a.jpg' when the cache was planned" in capsys.readouterr().err
    plan = (tmp_path / "cache/plan.json").read_bytes()
    (tmp_path / "cache/pairs.parquet").unlink()
    for _ in range(2):  # the plan of the shards that are there stays
        with pytest.raises(SystemExit):
            run_cache(tmp_path / "cache", data)
        assert "the reader's rows are not those of the plan any more" in capsys.readouterr().err
        assert (tmp_path / "cache/plan.json").read_bytes() == plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "reader is missing"),
        ([*SETTINGS, "--reader.root={data}", "--images_per_shard=0"], "images_per_shard: 0 is outside"),
        (["--encoder.source=sd_tiny"], "encoder: its class is not given; say --encoder CLASS too; choose from Pip"),
        ([*SETTINGS, "--reader.root={data}", "--encoder.source=/nowhere"], "'/nowhere' does not exist"),
        (
            [*SETTINGS, "--reader.root={data}", "--encoder=PublishedLatents"],
            "takes latents, but the reader holds images",
        ),
        ([*SETTINGS, "--reader.root={data}", "--images.min_pixels=100000"], "none of its rows can be cached"),
        (["--check"], "is not a cache"),
    ],
)
def test_bad_input_is_one_line(
    written: tuple[Path, Path], tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as status:
        main(["cache", str(tmp_path / "cache"), *(argument.format(data=written[0]) for argument in arguments)])
    assert status.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("latentreward: error: ")
    assert message in error


def test_a_folder_that_holds_the_vae_alone_will_do(tmp_path: Path) -> None:
    whole = Path(tiny_pipeline("sd35_tiny"))
    index = json.loads((whole / "model_index.json").read_text())
    shutil.copytree(whole / "vae", tmp_path / "vae")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": index["_class_name"], "vae": index["vae"]}))
    found, want = (PipelineEncoders(str(source)).load() for source in (tmp_path, "sd35_tiny"))
    assert found.vae_fingerprint == want.vae_fingerprint and found.space == want.space


def with_other(name: str, folder: Path, **classes: str) -> Path:
    """A copy of a pipeline whose parts have other classes."""
    shutil.copytree(pipeline_folder(name), folder)
    for part, kind in classes.items():
        config = folder / part / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": kind}))
    return folder


def without(part: str, source: str, folder: Path) -> Path:
    """A copy of a pipeline whose index lacks a part."""
    shutil.copytree(source, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, part: [None, None]}))
    return folder


def test_a_network_that_is_not_needed_may_be_missing_or_unknown(tmp_path: Path) -> None:
    unknown = with_other("sd35", tmp_path / "unknown", transformer="PixArtTransformer2DModel")
    refused = with_other("sdxl", tmp_path / "refused", unet="UNetSpatioTemporalConditionModel")
    missing = without("unet", pipeline_folder("sd15"), tmp_path / "missing")
    for source, name, text in ((unknown, "sd35", False), (refused, "sdxl", True), (missing, "sd15", True)):
        found, want = (PipelineEncoders(str(folder), text=text).load() for folder in (source, pipeline_folder(name)))
        for field in ("space", "vae_fingerprint", "text_spec"):
            assert getattr(found, field) == getattr(want, field)
    with pytest.raises(InputError, match="is of no known family"):
        PipelineEncoders(str(unknown), text=True).load()
    with pytest.raises(InputError, match="is of no known family"):  # T5 is no second CLIP
        PipelineEncoders(str(without("transformer", TWINS["flux1_dev"].folder, tmp_path / "flux")), text=True).load()
    sana = with_other("sd35", tmp_path / "sana", transformer="SanaTransformer2DModel", vae="AutoencoderDC")
    with pytest.raises(InputError, match=r"no family here has its VAE .* give a class of your own as family"):
        PipelineEncoders(str(sana)).load()


class SameKey(PairReader):
    """A reader of a user's own, one of whose keys is of two rows' images; bytes are equally many, and end alike."""

    def __init__(self, root: str, given: str, other: str) -> None:
        super().__init__()
        self.root, self.given, self.names = Path(root), given, ["0a.jpg", "0b.jpg", "1a.jpg", other]

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> PreferencePair:
        files = [self.root / "images" / name for name in self.names[2 * index :][:2]]
        keys = [f"{index}a", "key"]
        data = ({"data": file.read_bytes().ljust(9000, b"\0")} for file in files)
        given = ({"path": file} for file in files) if self.given == "path" else data
        refs = [ImageRef(key, **one) for key, one in zip(keys, given, strict=True)]
        return PreferencePair(f"row {index}", "a cat", *refs, label_a=1.0)


@pytest.mark.parametrize("given", ["path", "data"])
def test_a_key_of_two_images_is_refused_and_one_of_equal_files_is_taken(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, cache = write_data(tmp_path / "data", pairs=2), tmp_path / "cache"
    shutil.copy(data / "images" / "0b.jpg", data / "images" / "copy.jpg")
    own = [f"--reader={__name__}.SameKey", f"--reader.root={data}", f"--reader.given={given}"]
    settings = [*(one for one in SETTINGS if not one.startswith("--reader")), "--images.size=32", *own]
    settings = [one for one in settings if not one.startswith(("--images.buckets", "--images.min_pixels"))]
    main(["cache", str(cache), *settings, "--reader.other=copy.jpg"])
    assert len(table(cache, IMAGES)) == 3
    with pytest.raises(SystemExit):
        main(["cache", str(tmp_path / "refused"), *settings, "--reader.other=1b.jpg"])
    files = [f"{data}/images/{name}" if given == "path" else "bytes" for name in ("0b.jpg", "1b.jpg")]
    expected = f"image_key='key' is of {files[0]} (row row 0) and of {files[1]} (row row 1); give each its own"
    assert expected in capsys.readouterr().err
    assert not list((tmp_path / "refused").glob("*.safetensors"))


def test_noises_of_generated_pictures_follow_their_images(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path)
    rows = [json.loads(line) | {"noise_a": f"0 {n}/0 4x8x8"} for n, line in enumerate(file.read_text().splitlines())]
    rows[1] |= {"noise_b": "0 1/1 4x8x8", "label": 0.0}
    file.write_text("\n".join(map(json.dumps, rows)))
    size = ["--images.buckets=null", "--images.size=[32,32]"]
    reader = ["--reader=JSONLPairReader", f"--reader.file={file}"]
    main(["cache", str(tmp_path / "cache"), *SETTINGS[2:], *reader, *size])
    index = CacheIndex(tmp_path / "cache")
    batch = CachedPairDataset(index, range(4)).__getitems__([2, 1, 0])
    assert batch.chosen_noise == ("0 2/0 4x8x8", "0 1/1 4x8x8", "0 0/0 4x8x8")
    assert batch.rejected_noise == (None, "0 1/0 4x8x8", None)
    assert batch.chosen_keys == ("2a.jpg", "1b.jpg", "0a.jpg")
