"""Files are whole or absent, and are what safetensors reads."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentreward.core.storage.digests import file_hash
from latentreward.diffusion.cache.shards import write_shard


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_written_in_batches_are_one_safetensors_file(tmp_path: Path, dtype: torch.dtype) -> None:
    tokens, pooled = torch.randn(5, 3, 7).to(dtype), torch.randn(5, 2).to(dtype)
    path = tmp_path / "text" / "0.safetensors"

    def batches() -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        for first in (0, 2, 4):
            rows = slice(first, first + 2)
            yield first, {"tokens": tokens[rows], "pooled": pooled[rows]}
            assert not path.exists()

    assert write_shard(path, {"tokens": (5, 3, 7), "pooled": (5, 2)}, dtype, batches()) == file_hash(path)
    read = load_file(path)
    assert torch.equal(read["tokens"], tokens)
    assert torch.equal(read["pooled"], pooled)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_error_leaves_neither_file_nor_remains(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="planned"):
        write_shard(
            tmp_path / "0.safetensors", {"latents": (2, 3)}, torch.float32, [(0, {"latents": torch.zeros(1, 4)})]
        )
    assert not list(tmp_path.iterdir())
