"""Program of toy steps: ``pairs FOLDER``, and ``scores FOLDER PAIRS SEED SKILL``, each as the real steps write them."""

import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

PAIRS = 60


def write_pairs(folder: Path) -> None:
    rng = np.random.default_rng(0)
    table = {"pair_id": [f"p{row}" for row in range(PAIRS)]}
    table |= {f"key_{side}": [f"{side}{row}" for row in range(PAIRS)] for side in "ab"}
    parts = {f"{part}_{side}": rng.random(PAIRS) for part in ("alignment", "quality") for side in "ab"}
    utility = {f"utility_{side}": 4 * parts[f"alignment_{side}"] + 2 * parts[f"quality_{side}"] for side in "ab"}
    parquet.write_table(pa.table({**table, **parts, **utility}), folder / "oracle.parquet")


def write_scores(folder: Path, pairs: Path, seed: int, skill: float) -> None:
    """Scores are the utilities times ``skill`` plus noise of its own at each level; each second pair's winner is b."""
    rows = parquet.read_table(pairs / "oracle.parquet").to_pylist()
    rng = np.random.default_rng(seed)
    table = []
    for timestep in (1.0, 801.0):
        for place, row in enumerate(rows):
            chosen, rejected = "ab" if place % 2 else "ba"
            margin = skill * (row[f"utility_{chosen}"] - row[f"utility_{rejected}"]) + rng.normal()
            names = {"chosen_key": row[f"key_{chosen}"], "rejected_key": row[f"key_{rejected}"]}
            table.append({"pair_id": row["pair_id"], **names, "timestep": timestep, "sigma": 0.1, "margin": margin})
    parquet.write_table(pa.Table.from_pylist(table), folder / "scores_rank0.parquet")


if __name__ == "__main__":
    kind, folder, *rest = sys.argv[1:]
    print(f"toy step {kind}", flush=True)
    if kind == "pairs":
        write_pairs(Path(folder))
    elif kind == "scores":
        write_scores(Path(folder), Path(rest[0]), int(rest[1]), float(rest[-1]))
    elif kind == "wait":
        time.sleep(600)
    else:
        sys.exit(f"no kind {kind}")
