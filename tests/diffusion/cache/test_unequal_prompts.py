"""Caches of prompts with unequal numbers of tokens, without a pooled vector, and of latents with a time axis."""

import json
import shutil
import signal
from collections import namedtuple
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentreward.apps.cli import main
from latentreward.core.contracts import ImageRef, PreferencePair
from latentreward.core.errors import InputError
from latentreward.core.seeding import pair_generator
from latentreward.data import ImageError, PixelLoader
from latentreward.diffusion import CachedPreferenceDataModule, CachedSplit
from latentreward.diffusion.cache import encoding
from latentreward.diffusion.cache.buffers import BufferPool, layout_bytes
from latentreward.diffusion.cache.dataset import CachedPairDataset
from latentreward.diffusion.cache.index import CachedPairs, CacheIndex
from latentreward.diffusion.cache.layout import IMAGES, PROMPTS, SHARDS, manifest_name, read_plan
from latentreward.diffusion.cache.plan import RowScan
from latentreward.diffusion.cache.sizing import ImageSettings
from tests.diffusion.cache.writing import cache_arguments, contents, row, run_cache, write_data, write_image, write_rows
from tests.diffusion.families.twins import QUICK, TWINS
from tests.marks import rotated_after
from tests.processes import start_ranks
from tests.unequal_prompts import MOST, SPACE, clip_encoder, letter_states

PROMPT_TEXTS = ("a cat", "", "two dogs, and much more than fits", "dog", "a", "bird", "owl")
OPTIONS = (
    "--reader=latentreward.data.HPDv3Reader",
    "--reader.split=train",
    "--encoder=tests.unequal_prompts.ClipsAndStates",
    "--images.size=16",
    "--images_per_shard=8",
    "--num_workers=0",
    "--dtype=float32",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
)
Usage = namedtuple("Usage", ["total", "used", "free"])


def arguments(output: Path, data: Path, *settings: str) -> list[str]:
    return ["cache", str(output), *OPTIONS, f"--reader.root={data}", *settings]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set and its cache."""
    folder = tmp_path_factory.mktemp("unequal")
    for number in range(7):
        write_image(folder / f"data/images/{number}.jpg", number, (16, 16))
    pairs = [row(text, f"images/{n}.jpg", f"images/{(n + 1) % 7}.jpg") for n, text in enumerate(PROMPT_TEXTS)]
    write_rows(folder / "data", pairs)
    main(arguments(folder / "cache", folder / "data"))
    return folder / "data", folder / "cache"


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / name).to_pylist()


def text_shards(folder: Path) -> list[str]:
    return [shard["name"] for shard in table(folder, SHARDS) if shard["kind"] == "text"]


def dataset(folder: Path) -> CachedPairDataset:
    index = CacheIndex(folder)
    return CachedPairDataset(index, CachedPairs(index).rows)


def test_shards_hold_the_tokens_of_the_prompts_and_nothing_else(written: tuple[Path, Path]) -> None:
    cache, encoder = written[1], letter_states()
    shards = table(cache, SHARDS)
    starts = dict.fromkeys(text_shards(cache), 0)
    assert len(starts) == 2
    for prompt in table(cache, PROMPTS):
        name = shards[prompt["shard"]]["name"]
        tensors = load_file(cache / name)
        assert tensors.keys() == {"prompt_lengths", "prompt_embeds"}
        count = int(tensors["prompt_lengths"][prompt["row"]])
        assert count == min(len(prompt["prompt"]) + 1, MOST) == encoder.count_tokens([prompt["prompt"]])[0]
        found = tensors["prompt_embeds"][starts[name] : starts[name] + count]
        torch.testing.assert_close(found, encoder([prompt["prompt"]]).prompt_embeds[0], rtol=1e-5, atol=1e-6)
        starts[name] += count
    assert starts == {name: len(load_file(cache / name)["prompt_embeds"]) for name in starts}
    assert read_plan(cache).spec.text.masked


def test_latents_have_a_time_axis_and_are_the_encoder_s_own(written: tuple[Path, Path]) -> None:
    data, cache = written
    shards = table(cache, SHARDS)
    for image in table(cache, IMAGES)[:3]:
        key = image["image_key"]
        pixels = PixelLoader(16, 16, "center_crop")(ImageRef(key, path=data / key)).unsqueeze(0)
        noise = torch.randn(4, 1, 8, 8, generator=pair_generator(0, "posterior", 0, "", key))
        found = load_file(cache / shards[image["shard"]]["name"])["latents"][image["row"]]
        torch.testing.assert_close(found, clip_encoder().encode(pixels, noise[None])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooled", [False, True], ids=["own memory", "slot"])
def test_a_batch_is_padded_to_its_longest_prompt(written: tuple[Path, Path], pooled: bool) -> None:
    data, encoder = dataset(written[1]), letter_states()
    if pooled:
        data.pool = BufferPool(1, layout_bytes(data.layout(len(data), 0)))
        assert data.pool.take(layout_bytes(data.layout(len(data), 0))) == 0
        data.pool.free(0)
    for numbers in ([0, 3, 4], [2, 0], [6], list(range(7))):
        if pooled:
            data.pool.bytes_of(0, data.pool.slot_bytes).fill_(255)  # what an earlier batch left
        batch = data.__getitems__(numbers)
        wanted = encoder(batch.prompts)
        found, uncond = batch.conditioning, batch.uncond
        assert batch.chosen.shape == (len(numbers), 4, 1, 8, 8)
        assert found.pooled_prompt_embeds is None and uncond.pooled_prompt_embeds is None
        assert torch.equal(found.prompt_mask, wanted.prompt_mask)
        kept = wanted.prompt_mask.unsqueeze(-1)
        torch.testing.assert_close(found.prompt_embeds, wanted.prompt_embeds * kept, rtol=1e-5, atol=1e-6)
        assert uncond.prompt_embeds.shape == (1, 1, 6) and uncond.prompt_mask.all()
        torch.testing.assert_close(uncond.prompt_embeds, encoder([""]).prompt_embeds, rtol=1e-5, atol=1e-6)
        del batch, found, uncond


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_these_batches(written: tuple[Path, Path], workers: int) -> None:
    loading = {"batch_size": 2, "num_workers": workers, "seed": 0}
    module = CachedPreferenceDataModule(predict=CachedSplit(str(written[1])), **loading)
    encoder, seen = letter_states(), []
    for batch in module.predict_dataloader():
        wanted = encoder(batch.prompts)
        assert torch.equal(batch.conditioning.prompt_mask, wanted.prompt_mask)
        torch.testing.assert_close(batch.conditioning.pooled(), wanted.pooled(), rtol=1e-5, atol=1e-6)
        seen += batch.prompts
    assert sorted(seen) == sorted(PROMPT_TEXTS)


def test_a_resumed_run_and_workers_give_the_same_bytes(
    written: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = written
    own, calls = encoding.encode_batch, []

    def interrupted(*given: Any) -> dict[str, torch.Tensor]:
        calls.append(given)
        if len(calls) == 2:  # within the first shard, of text
            signal.raise_signal(signal.SIGINT)
        return own(*given)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_batch", interrupted)
        with pytest.raises(SystemExit):
            main(arguments(tmp_path / "cache", data))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    main(arguments(tmp_path / "cache", data, "--num_workers=1"))
    assert contents(tmp_path / "cache") == contents(cache)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(written: tuple[Path, Path], tmp_path: Path) -> None:
    two = ("--trainer.devices=2", "--trainer.strategy=ddp")
    for run in start_ranks(arguments(tmp_path / "cache", written[0], *two), 2, threads=2):
        assert run.wait(300) == 0, run.stderr
    assert contents(tmp_path / "cache") == contents(written[1])


def exchange(cache: Path, change: Any, hashed: bool) -> str:
    """Change the tensors of the first text shard, with its hash in the manifest if ``hashed``."""
    name = text_shards(cache)[0]
    save_file(change(load_file(cache / name)), cache / name)
    if hashed:
        manifest = json.loads((cache / manifest_name(name)).read_text())
        manifest["sha256"] = sha256((cache / name).read_bytes()).hexdigest()
        (cache / manifest_name(name)).write_text(json.dumps(manifest))
    return name


@pytest.mark.parametrize(
    ("change", "hashed", "problem"),
    [
        (lambda held: {**held, "prompt_lengths": held["prompt_lengths"].flip(0)}, False, "is damaged: its hash"),
        (lambda held: {**held, "prompt_lengths": held["prompt_lengths"] + 1}, True, "holds no prompt_embeds of shape"),
        (lambda held: {**held, "prompt_lengths": held["prompt_lengths"] - 1}, True, "holds no prompt_embeds of shape"),
        (lambda held: {**held, "prompt_embeds": held["prompt_embeds"][1:]}, True, "holds no prompt_embeds of shape"),
        (lambda held: {"prompt_embeds": held["prompt_embeds"]}, True, "holds no prompt_lengths of shape (4,)"),
        (lambda held: {**held, "prompt_lengths": held["prompt_lengths"].long()}, True, "is not a safetensors file"),
    ],
)
def test_check_finds_wrong_lengths(
    written: tuple[Path, Path],
    tmp_path: Path,
    change: Any,
    hashed: bool,
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = Path(shutil.copytree(written[1], tmp_path / "cache"))
    main(["cache", str(cache), "--check"])
    assert "is whole: 7 pairs" in capsys.readouterr().out
    name = exchange(cache, change, hashed)
    with pytest.raises(SystemExit):
        main(["cache", str(cache), "--check"])
    assert f"{name} {problem}" in capsys.readouterr().out
    if hashed:
        with pytest.raises(InputError, match=r"holds no prompt_|is not a safetensors file"):
            CacheIndex(cache)


def test_the_bytes_are_told_before_encoding_and_a_full_disk_is_refused(
    written: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, cache = written
    tokens = sum(letter_states().count_tokens(PROMPT_TEXTS))
    latents, text = 7 * 4 * 8 * 8 * 4, tokens * 6 * 4 + 7 * 4
    held = {
        shard["name"]: sum(tensor.nbytes for tensor in load_file(cache / shard["name"]).values())
        for shard in table(cache, SHARDS)
    }
    assert sum(held.values()) == latents + text
    assert sum(held[name] for name in text_shards(cache)) == text
    told = f"latents 1.0 KiB per image, 7.0 KiB for 7; text {text / 7:.0f} B per prompt, {text} B for 7"

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, size))

    free(latents + text - 1)
    with pytest.raises(SystemExit) as status:
        main(arguments(tmp_path / "cache", data))
    assert status.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"latentreward: error: output='{tmp_path / 'cache'}': ") and f"({told})" in line
    assert "free some space, choose another output, or cache less, e.g. encoder.text: none" in line
    assert contents(tmp_path / "cache").keys() <= {".lock"}
    free(latents + text)
    main(arguments(tmp_path / "cache", data))
    assert f"cache: to write: {told}\n" in capsys.readouterr().err
    assert contents(tmp_path / "cache").keys() == contents(cache).keys()
    name = text_shards(cache)[0]
    (tmp_path / "cache" / name).unlink()
    size = held[name]
    free(size - 1)
    with pytest.raises(SystemExit):
        main(arguments(tmp_path / "cache", data))
    assert f"(text {size / 4:.0f} B per prompt, {size} B for 4)" in capsys.readouterr().err
    free(size)
    main(arguments(tmp_path / "cache", data))
    assert contents(tmp_path / "cache") == contents(cache)
    capsys.readouterr()
    free(0)
    main(arguments(tmp_path / "cache", data))
    assert "to write" not in capsys.readouterr().err


def test_sides_are_multiples_of_the_network_s(
    written: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments(tmp_path / "cache", written[0], "--images.size=18"))  # a multiple of the VAE's 2, not of 4
    assert "images.size: 18 is no multiple of the 4 " in capsys.readouterr().err
    data = write_data(tmp_path / "data")
    with pytest.raises(SystemExit):
        run_cache(tmp_path / "other", data, "--encoder.source=sd35_tiny", "--images.buckets=[[36,32]]")
    assert "images.buckets: 36x32: 36 is no multiple of the 8 " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ((), None),
        (("--encoder.text=none",), None),
        (("--encoder.text=false",), None),
        (("--encoder.text=states",), 16),
        (("--encoder.text=true",), 16),
        (("--encoder.text=true", "--encoder.t5_length=2"), 18),
    ],
)
def test_text_is_a_word_or_a_truth_value(tmp_path: Path, settings: tuple[str, ...], tokens: int | None) -> None:
    output, data = tmp_path / "cache", write_data(tmp_path / "data", pairs=1)
    run_cache(output, data, "--encoder.source=sd35_tiny", *settings)
    text = read_plan(output).spec.text
    assert (None if text is None else text.num_tokens) == tokens
    assert text is None or not text.masked


def test_text_in_yaml_is_a_word_or_a_truth_value(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", pairs=1)
    for word, cached in (("true", True), ("states", True), ("none", False), ("false", False)):
        config = tmp_path / "config.yaml"
        config.write_text(
            f"encoder: {{class_path: PipelineEncoders, init_args: {{source: sd_tiny, text: {word}, t5_length: null}}}}"
        )
        own = [setting for setting in cache_arguments(tmp_path / word, data) if "--encoder" not in setting]
        main([*own, f"--config={config}"])
        assert (read_plan(tmp_path / word).spec.text is not None) == cached


@pytest.mark.parametrize("twin", rotated_after(3, sorted(TWINS, key=lambda name: name not in QUICK)))
def test_tokenisation_tells_the_lengths_of_a_family_s_prompts(twin: str) -> None:
    encoder = TWINS[twin].source().load().text_encoder
    texts = ["", "a cat", "two dogs on a hill in the rain", "word " * 2000]
    with torch.no_grad():
        encoded = encoder(texts)
    lengths = [encoded.prompt_embeds.shape[1]] * 4 if not encoder.masked else encoded.prompt_mask.sum(dim=1).tolist()
    assert encoder.count_tokens(texts) == lengths
    assert max(lengths) <= encoder.num_tokens


def test_published_latents_have_the_shape_of_their_space() -> None:
    def scanned(shape: tuple[int, ...]) -> Any:
        stream = BytesIO()
        np.save(stream, np.zeros(shape, np.float16))
        image = ImageRef("a", data=stream.getvalue(), holds="latents")
        reader = [PreferencePair("pair", "a cat", image, image, 1.0)]
        return RowScan(type("Reader", (list,), {"on_error": "raise"})(reader), ImageSettings(), SPACE, lambda _: None)[
            0
        ]

    assert scanned((4, 1, 8, 12)).sizes == ((16, 24), (16, 24))
    for other in ((4, 2, 8, 12), (3, 1, 8, 12)):
        with pytest.raises(ImageError, match="but the latent space has"):
            scanned(other)
    with pytest.raises(ImageError, match=r"is not a \(C, T, h, w\) array"):
        scanned((4, 8, 12))
