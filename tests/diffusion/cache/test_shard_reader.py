"""Rows read from safetensors files into a given buffer, and memory that is used again."""

import multiprocessing
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentreward.core.errors import InputError
from latentreward.diffusion.cache import shards as store_module
from latentreward.diffusion.cache.buffers import BufferPool, carve, layout_bytes, own_buffer
from latentreward.diffusion.cache.shards import ShardStore, read_header


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float32], ids=str)
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[Path], list[torch.Tensor]]:
    """Three files of seven rows each, beside a second tensor, and their contents."""
    contents = [torch.randn(7, 2, 3, 5).to(request.param) for _ in range(3)]
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, content in zip(paths, contents, strict=True):
        save_file({"another": torch.arange(9), "latents": content} if path.stem == "9" else {"latents": content}, path)
    return paths, contents


def rows(store: ShardStore, contents: Sequence[torch.Tensor], places: Sequence[tuple[int, int]]) -> None:
    """Read ``places`` and compare."""
    out = torch.empty(len(places), *contents[0].shape[1:], dtype=contents[0].dtype)
    store.read("latents", places, out)
    for place, row in zip(places, out, strict=True):
        assert torch.equal(row, contents[place[0]][place[1]]), place


def test_rows_come_in_any_order_from_any_file(shards: tuple[list[Path], list[torch.Tensor]]) -> None:
    paths, contents = shards
    store = ShardStore(paths)
    rows(store, contents, [(2, 6), (0, 0), (1, 3), (1, 2), (1, 4), (0, 0), (2, 0)])
    rows(store, contents, [(number, row) for number in range(3) for row in range(7)])
    store.read("latents", [], torch.empty(0))


def test_neighbours_are_read_in_one_call(
    shards: tuple[list[Path], list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, contents = shards
    calls = []
    real = store_module.os.preadv
    monkeypatch.setattr(store_module.os, "preadv", lambda *args: calls.append(len(args[1])) or real(*args))
    rows(ShardStore(paths), contents, [(0, 4), (0, 2), (0, 3), (1, 0)])
    assert calls == [3, 1]


def test_a_read_that_stops_short_is_taken_up(
    shards: tuple[list[Path], list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, contents = shards
    real = store_module.os.preadv
    monkeypatch.setattr(store_module.os, "preadv", lambda file, views, at: real(file, [views[0][:10]], at))
    rows(ShardStore(paths), contents, [(0, 1), (0, 2), (2, 6)])


def test_few_files_are_open_at_a_time(shards: tuple[list[Path], list[torch.Tensor]]) -> None:
    paths, contents = shards
    store = ShardStore(paths)
    store._most_open = 2
    for _ in range(2):
        rows(store, contents, [(0, 1), (1, 1), (2, 1)])
        assert len(store._files) == 2


def test_a_store_survives_pickling_and_forking(shards: tuple[list[Path], list[torch.Tensor]]) -> None:
    paths, contents = shards
    store = ShardStore(paths)
    rows(store, contents, [(0, 1)])
    rows(pickle.loads(pickle.dumps(store)), contents, [(0, 1)])
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=rows, args=(store, contents, [(n % 3, n)] * 3)) for n in range(4)]
    for child in children:
        child.start()
    rows(store, contents, [(2, 2)])
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4


def test_other_tensors_of_a_file_do_not_matter(tmp_path: Path) -> None:
    contents = {"a": torch.randn(3, 4), "latents": torch.randn(5, 2), "z": torch.randn(7)}
    save_file(contents, tmp_path / "x.safetensors")
    block = read_header(tmp_path / "x.safetensors")["latents"]
    assert (block.rows, block.shape, block.row_bytes, block.dtype) == (5, (2,), 8, torch.float32)
    rows(ShardStore([tmp_path / "x.safetensors"]), [contents["latents"]], [(0, 4), (0, 0)])


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="is missing"):
        read_header(path)
    save_file({"latents": torch.randn(4, 3)}, path)
    whole = path.read_bytes()
    for damaged, message in [
        (whole[:-1], "bytes, but its header says"),
        (whole + b"x", "bytes, but its header says"),
        (b"", "no valid length"),
        (b"\xff" * 64, "no valid length"),
        ((2**20 + 1).to_bytes(8, "little") + b" " * 2**21, "no valid length"),
        (whole[:8] + b"{" + whole[9:8] + b"\x00" * (len(whole) - 9), "not a safetensors file"),
        (whole.replace(b"F32", b"I32"), "dtype I32"),
        (whole.replace(b"[4,3]", b"[4,9]"), "do not fit"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=message) as error:
            read_header(path)
        assert "\n" not in str(error.value)
        assert "cache --check" in str(error.value)


def test_a_file_that_shrank_since_it_was_opened_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"latents": torch.randn(4, 3)}, path)
    store = ShardStore([path])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="ends before row 3"):
        store.read("latents", [(0, 3)], torch.empty(1, 3))


def test_a_slot_is_free_when_the_last_tensor_in_it_is_gone() -> None:
    pool = BufferPool(2, 100)
    first = pool.take(100)
    assert first is not None
    layout = [((3, 2), torch.float16), ((5,), torch.float32)]
    tensors = carve(pool.leased(first, layout_bytes(layout)), layout)
    tensors[0].fill_(1)
    tensors[1].fill_(2)
    assert tensors[1].data_ptr() % 64 == 0
    assert pool.take(100) == 1
    assert pool.take(100) is None
    kept = tensors[0][1:]
    del tensors
    assert pool.take(100) is None
    assert kept.tolist() == [[1, 1], [1, 1]]
    del kept
    assert pool.take(100) == first


def test_a_batch_larger_than_a_slot_gets_memory_of_its_own() -> None:
    pool = BufferPool(2, 100)
    assert pool.take(pool.slot_bytes + 1) is None
    assert pickle.loads(pickle.dumps(pool)).take(1) is None
    assert own_buffer(10).shape == (10,)
