"""What ``latentreward cache`` writes, from data set to files."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentreward.apps.cli import main
from latentreward.core.contracts import ImageRef, PreferencePair
from latentreward.core.running import pair_generator
from latentreward.core.storage.durable import TEMPORARY_NAME
from latentreward.data import HPDv3Reader, PairReader, PixelLoader
from latentreward.diffusion.backbones.loading import PipelineSource, tiny_pipeline
from latentreward.diffusion.cache import writing
from latentreward.diffusion.cache.datamodule import CachedPairDataset, CacheIndex
from latentreward.diffusion.cache.store import IMAGES, PAIRS, PROMPTS, SPEC, read_plan
from tests.data.rotated import photograph, upright, write_jsonl
from tests.diffusion.cache.writing import (
    LARGE,
    SETTINGS,
    SQUARE,
    TALL,
    WIDE,
    contents,
    row,
    run_cache,
    stored,
    table,
    write_data,
    write_image,
    write_rows,
)
from tests.marks import rotated_after

WITH_TEXT = ("--encoder.text=true", "--encoder.prompts_per_shard=4", "--dtype=float32")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set and its cache, with text."""
    folder = tmp_path_factory.mktemp("written")
    data = write_data(folder / "data")
    run_cache(folder / "cache", data, *WITH_TEXT)
    return data, folder / "cache"


def test_every_pair_image_and_prompt_is_there_once(written: tuple[Path, Path]) -> None:
    data, cache = written
    reader, images, pairs = HPDv3Reader(str(data), "train"), table(cache, IMAGES), table(cache, PAIRS)
    prompts = table(cache, PROMPTS)
    assert [pair["pair_id"] for pair in pairs] == [reader[index].pair_id for index in range(len(reader))]
    for number, pair in enumerate(pairs):
        record = reader[number]
        assert images[pair["image_a"]]["image_key"] == record.image_a.image_key
        assert images[pair["image_b"]]["image_key"] == record.image_b.image_key
        assert prompts[pair["prompt"]]["prompt"] == record.prompt
        assert (pair["label_a"], pair["weight"], tuple(pair["votes"])) == (record.label_a, 1.0, record.votes)
        for name in ("model_a", "model_b", "split", "confidence", "group_id", "source"):
            assert pair[name] == getattr(record, name)
    keys = [(image["image_key"], image["height"], image["width"]) for image in images]
    assert len(keys) == len(set(keys)) == 20
    assert prompts[0]["prompt"] == "" and len({prompt["prompt"] for prompt in prompts}) == len(prompts) == 7
    for image, latents in zip(images, stored(cache), strict=True):
        assert latents.shape == (4, image["height"] // 4, image["width"] // 4)
    files = [path.name for path in cache.glob("latents-*")]
    assert len(files) == 4 and all(len(load_file(cache / name)["latents"]) <= 8 for name in files)


def test_latents_and_embeddings_are_the_encoders_own(written: tuple[Path, Path]) -> None:
    data, cache = written
    encoder, texts = (PipelineSource(tiny_pipeline("sd_tiny")) for _ in range(2))
    vae, clip = encoder.latent_encoder(), texts.clip_prompts()
    for image, found in list(zip(table(cache, IMAGES), stored(cache), strict=True))[:6]:
        key, size = image["image_key"], (image["height"], image["width"])
        pixels = PixelLoader(*size, "center_crop")(ImageRef(key, path=data / "images" / Path(key).name))[None]
        noise = torch.randn(4, size[0] // 4, size[1] // 4, generator=pair_generator(0, "posterior", 0, "", key))
        torch.testing.assert_close(found, vae.encode(pixels, noise[None])[0], atol=1e-5, rtol=1e-5)
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        for prompt, found in zip(table(cache, PROMPTS), stored(cache, "text", name), strict=True):
            expected = getattr(clip([prompt["prompt"]]), name)[0]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_stored_type_mode_and_one_size(written: tuple[Path, Path], tmp_path: Path, dtype: str) -> None:
    settings = ["--images.buckets=null", "--images.size=32", "--images.min_pixels=null", "--images.resize=stretch"]
    run_cache(tmp_path / "cache", written[0], f"--dtype={dtype}", "--encoder.posterior=mode", *settings)
    image, found = table(tmp_path / "cache", IMAGES)[5], stored(tmp_path / "cache")
    assert {latents.shape[1:] for latents in found} == {(8, 8)} and found[5].dtype == getattr(torch, dtype)
    assert not list((tmp_path / "cache").glob("text-*"))
    pixels = PixelLoader(32, 32, "stretch")(ImageRef("", path=written[0] / "images" / Path(image["image_key"]).name))
    expected = PipelineSource(tiny_pipeline("sd_tiny")).latent_encoder().encode(pixels[None])[0]
    torch.testing.assert_close(found[5].float(), expected, atol=0.02, rtol=0.02)


def test_a_pair_across_buckets_has_entries_of_its_own(tmp_path: Path) -> None:
    for number, size in enumerate((SQUARE, SQUARE, LARGE, TALL)):
        write_image(tmp_path / f"images/{number}.jpg", number, size)
    small, small_2, large, tall = (f"images/{number}.jpg" for number in range(4))
    rows = [row("a", small, small_2), row("b", small, large), row("c", small, tall)]
    run_cache(tmp_path / "cache", write_rows(tmp_path, rows))
    sizes = [(image["image_key"], image["height"]) for image in table(tmp_path / "cache", IMAGES)]
    assert sorted(sizes) == [(small, 32), (small_2, 32), (large, 32)]  # 45 × 45 on average, in log area nearer to 32
    assert read_plan(tmp_path / "cache").dropped == {"images of different aspect ratio": 1}


@pytest.mark.parametrize("settings", [("--images.buckets=null", "--images.size=32"), ()], ids=["size", "buckets"])
@pytest.mark.parametrize("on_error", rotated_after(1, ["raise", "skip", "placeholder"]))
def test_images_that_cannot_be_read(
    tmp_path: Path, on_error: str, settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    data, cache = write_data(tmp_path / "data", sizes=[SQUARE]), tmp_path / "cache"
    whole = (data / "images/3b.jpg").read_bytes()
    (data / "images/3b.jpg").write_bytes(whole[:-40])  # its header is whole
    options = (f"--reader.on_error={on_error}", "--images.min_pixels=null" if settings else "--images.min_pixels=0")
    if on_error == "raise":
        with pytest.raises(SystemExit):
            run_cache(cache, data, *options, *settings)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "'images/3b.jpg'" in error and "on_error" in error and not list(cache.rglob("*.partial"))
        return
    run_cache(cache, data, *options, *settings)
    assert "images not read: 1 truncated or damaged image ('images/3b.jpg')" in capsys.readouterr().out
    main(["cache", str(cache), "--check"])
    assert "could not be read when the cache was written: 1 truncated" in capsys.readouterr().out
    assert CacheIndex(cache).unreadable.sum() == 1
    (data / "images/3b.jpg").write_bytes(whole)
    run_cache(tmp_path / "whole", data, *options, *settings)
    for image, found, other in zip(table(cache, IMAGES), stored(cache), stored(tmp_path / "whole"), strict=True):
        lost = image["image_key"] == "images/3b.jpg"
        assert not found.any() if lost else torch.equal(found, other)  # its neighbours do not notice


@pytest.mark.slow
def test_loader_processes_do_not_change_a_byte(written: tuple[Path, Path], tmp_path: Path) -> None:
    data, cache = written
    run_cache(tmp_path / "cache", data, *WITH_TEXT, "--num_workers=2")
    assert contents(tmp_path / "cache") == contents(cache)


def test_ctrl_c_keeps_finished_files(
    written: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, cache = written
    own, calls = writing.encode_batch, []

    def interrupted(*arguments: Any) -> dict[str, torch.Tensor]:
        calls.append(arguments)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return own(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "encode_batch", interrupted)
        with pytest.raises(SystemExit) as stop:
            run_cache(tmp_path / "cache", data, *WITH_TEXT)
    assert stop.value.code == 130
    assert f"finished files are kept in {tmp_path / 'cache'}: the same command" in capsys.readouterr().err
    assert 0 < len(list((tmp_path / "cache").glob("*.safetensors"))) < 6
    assert not [path for path in (tmp_path / "cache").rglob("*") if TEMPORARY_NAME.fullmatch(path.name)]
    run_cache(tmp_path / "cache", data, *WITH_TEXT)
    assert contents(tmp_path / "cache") == contents(cache)


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
    if part == "decoder":
        run_cache(cache, written[0], *WITH_TEXT, f"--encoder.source={folder}")
    else:
        with pytest.raises(SystemExit):
            run_cache(cache, written[0], *WITH_TEXT, f"--encoder.source={folder}")
        assert 'was begun with vae "' in capsys.readouterr().err
    assert contents(cache) == contents(written[1])


REFUSED = {
    "--encoder.source=sd35_tiny": "text.fingerprint",  # its VAE is the same
    "--images.resize=stretch": "images.resize",
    "--images.buckets=[[32,32]]": "images.buckets",
    "--seed=1": "seed",
    "--dtype=float16": "dtype",
    "--encoder.batch_size=2": "batch_size",
    "--encoder.text=false": "text",
    "--reader.root={other}": "data.sample",
    "--reader.exif=apply": "exif",
}


@pytest.mark.parametrize(("setting", "key"), REFUSED.items())
def test_other_settings_and_data_are_refused(
    written: tuple[Path, Path], tmp_path: Path, setting: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, cache = written
    if "{other}" in setting:
        other = write_data(tmp_path / "data", sizes=[TALL, TALL, SQUARE])
        rows = json.loads((other / "train.json").read_text())
        write_rows(other, [{**one, "prompt": f"other {one['prompt']}"} for one in rows])
        setting = setting.format(other=other)
    before = contents(cache)
    with pytest.raises(SystemExit):
        run_cache(cache, data, *WITH_TEXT, setting)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{cache} was begun with {key} " in error and "another output" in error
    assert contents(cache) == before


def own_cache(output: Path, file: Path, *settings: str) -> None:
    reader = ("--reader=latentreward.data.JSONLPairReader", f"--reader.file={file}")
    main(["cache", str(output), *SETTINGS[2:], *reader, "--dtype=float32", *settings])


def test_photographs_are_cached_upright_and_the_cache_says_so(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path)
    for exif, shape in (("apply", TALL), ("ignore", WIDE)):
        own_cache(tmp_path / exif, file, f"--reader.exif={exif}")
        assert read_plan(tmp_path / exif).spec.exif == exif
        assert {(image["height"], image["width"]) for image in table(tmp_path / exif, IMAGES)} == {shape}
    own_cache(tmp_path / "default", file)
    assert contents(tmp_path / "default") == contents(tmp_path / "apply")
    keys = [image["image_key"] for image in table(tmp_path / "apply", IMAGES)]
    pixels = PixelLoader(*TALL, "center_crop").pixels(upright(photograph(seed=0)))
    noise = torch.randn(4, 12, 8, generator=pair_generator(0, "posterior", 0, "", "0a.jpg"))
    expected = PipelineSource(tiny_pipeline("sd_tiny")).latent_encoder().encode(pixels[None], noise[None])[0]
    torch.testing.assert_close(stored(tmp_path / "apply")[keys.index("0a.jpg")], expected)


def test_a_row_that_changed_since_planning_is_found(
    written: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, cache = Path(shutil.copytree(written[0], tmp_path / "data")), tmp_path / "cache"
    rows = [row(f"{index}", f"images/{index % 12}a.jpg", f"images/{index % 12}b.jpg") for index in range(100)]
    run_cache(cache, write_rows(data, rows))
    rows[1]["path1"] = "images/5a.jpg"  # not among the rows that are compared at the start
    write_rows(data, rows)
    for path in cache.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(SystemExit):
        run_cache(cache, data)
    assert "but was 'images/1a.jpg' when the cache was planned" in capsys.readouterr().err
    plan = (cache / SPEC).read_bytes()
    (cache / PAIRS).unlink()
    with pytest.raises(SystemExit):
        run_cache(cache, data)
    assert "the reader's rows are others now" in capsys.readouterr().err
    assert (cache / SPEC).read_bytes() == plan


BAD = {
    "reader": [],
    "images_per_shard": [*SETTINGS, "--reader.root={data}", "--images_per_shard=0"],
    "encoder": ["--encoder.source=sd_tiny"],
    "/nowhere": [*SETTINGS, "--reader.root={data}", "--encoder.source=/nowhere"],
    "holds images": [*SETTINGS, "--reader.root={data}", "--encoder=PublishedLatents"],
    "none of its rows": [*SETTINGS, "--reader.root={data}", "--images.min_pixels=100000"],
    "images.size: 18": [*SETTINGS, "--reader.root={data}", "--images.size=18", "--images.buckets=null"],
    "images.buckets: 36x32": [
        *SETTINGS,
        "--reader.root={data}",
        "--images.buckets=[[36,32]]",
        "--encoder.source=sd35_tiny",
    ],
    "is not a cache": ["--check"],
    "images.cross_bucket": [*SETTINGS, "--reader.root={data}", "--images.cross_bucket=drop"],
}


@pytest.mark.parametrize(("key", "arguments"), BAD.items())
def test_bad_input_is_one_line(
    written: tuple[Path, Path], tmp_path: Path, key: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as status:
        main(["cache", str(tmp_path / "cache"), *(argument.format(data=written[0]) for argument in arguments)])
    assert status.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("latentreward: error: ") and key in error


def test_a_folder_of_other_files_is_left_alone(
    written: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        run_cache(tmp_path, written[0])
    assert "notes.txt" in capsys.readouterr().err and (tmp_path / "notes.txt").read_text() == "mine"


class SameKey(PairReader):
    """A reader of a user's own, one of whose keys is of two rows' images; bytes are equally many, and end alike."""

    def __init__(self, root: str, given: str, other: str) -> None:
        super().__init__()
        self.root, self.given, self.names = Path(root), given, ["0a.jpg", "0b.jpg", "1a.jpg", other]

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> PreferencePair:
        files = [self.root / "images" / name for name in self.names[2 * index :][:2]]
        data = ({"data": file.read_bytes().ljust(9000, b"\0")} for file in files)
        given = ({"path": file} for file in files) if self.given == "path" else data
        refs = [ImageRef(key, **one) for key, one in zip([f"{index}a", "key"], given, strict=True)]
        return PreferencePair(f"row {index}", "a cat", *refs, label_a=1.0)


@pytest.mark.parametrize("given", ["path", "data"])
def test_a_key_of_two_images_is_refused_and_one_of_equal_files_is_taken(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, cache = write_data(tmp_path / "data", pairs=2), tmp_path / "cache"
    shutil.copy(data / "images" / "0b.jpg", data / "images" / "copy.jpg")
    left_out = ("--reader", "--images.buckets", "--images.min_pixels")
    own = [f"--reader={__name__}.SameKey", f"--reader.root={data}", f"--reader.given={given}", "--images.size=32"]
    settings = [*(one for one in SETTINGS if not one.startswith(left_out)), *own]
    main(["cache", str(cache), *settings, "--reader.other=copy.jpg"])
    assert len(table(cache, IMAGES)) == 3
    with pytest.raises(SystemExit):
        main(["cache", str(tmp_path / "refused"), *settings, "--reader.other=1b.jpg"])
    assert "image_key='key' is of " in capsys.readouterr().err
    assert not list((tmp_path / "refused").glob("*.safetensors"))


def test_noises_of_generated_pictures_follow_their_images(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path)
    rows = [json.loads(line) | {"noise_a": f"0 {n}/0 4x8x8"} for n, line in enumerate(file.read_text().splitlines())]
    rows[1] |= {"noise_b": "0 1/1 4x8x8", "label": 0.0}
    file.write_text("\n".join(map(json.dumps, rows)))
    own_cache(tmp_path / "cache", file, "--images.buckets=null", "--images.size=[32,32]")
    batch = CachedPairDataset(CacheIndex(tmp_path / "cache"), range(4)).__getitems__([2, 1, 0])
    assert batch.chosen_noise == ("0 2/0 4x8x8", "0 1/1 4x8x8", "0 0/0 4x8x8")
    assert batch.rejected_noise == (None, "0 1/0 4x8x8", None)
    assert batch.chosen_keys == ("2a.jpg", "1b.jpg", "0a.jpg")
