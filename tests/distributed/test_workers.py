"""Commands on workers of a Ray cluster of two nodes: the files of one process, whatever is killed meanwhile."""

import json
import os
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from latentreward.apps.cli import main
from latentreward.apps.generation.trained_policy import files_named
from latentreward.core.errors import InputError
from tests.alignment.modules.test_edits import KLEIN, edits
from tests.alignment.rewards.stored import write_run
from tests.apps.commands.test_score import write_pictures
from tests.diffusion.cache.writing import write_data
from tests.distributed.toy_work import PARTS, squares
from tests.marks import rotated_after

SAMPLING = ("--sampling.num_inference_steps=2", "--guidance_scale=1", "--batch_size=2")
SCORER = {"function": "tests.apps.evaluation.policy.toy_scorers.redness", "name": "red"}
RED = json.dumps({"class_path": "latentreward.reward.CallableScorer", "init_args": SCORER})
COMMANDS = {
    "cache": (
        "cache", "out", "--reader=latentreward.data.HPDv3Reader", "--reader.root=data", "--reader.split=train",
        "--encoder=PipelineEncoders", "--encoder.source=sd_tiny", "--encoder.batch_size=2", "--encoder.text=true",
        "--images.size=32", "--images_per_shard=4", "--num_workers=1",
    ),
    "score": ("score", "pics", "out/scores.csv", "--model=model", "--flush_every=2", "--batch_size=2"),
    "generate": ("generate", "prompts.txt", "out", "--policy.source=sd_tiny", *SAMPLING),
    "edits": ("generate", "edits.jsonl", "out", f"--policy.source={KLEIN.folder}", *SAMPLING, "--sampling.width=32",
              "--sampling.height=32"),
    "evaluate-policy": (
        "evaluate-policy", "out", "--policy.pipeline=sd_tiny", "--prompts=prompts.txt", f"--scorers=[{RED}]", *SAMPLING,
    ),
}  # fmt: skip
"""Command lines in the folder that :func:`inputs` writes."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes on this machine, with Ray's token as a user would set it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        from ray.cluster_utils import Cluster  # which reads the variables

        for attempt in range(5):  # Ray gives a node half a minute to start, which a busy machine needs for the imports
            try:
                found = Cluster(True, head_node_args={"num_cpus": 2, "include_dashboard": False})
                break
            except Exception:
                if attempt == 4:
                    raise
        patch.setenv("RAY_ADDRESS", found.address)
        yield found
        found.shutdown()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_pictures(folder / "pics", 9)
    (folder / "prompts.txt").write_text("".join(f"a picture of {number} squares\n" for number in range(7)))
    write_run(folder / "model", "lrm", "sd15")
    write_data(folder / "data", pairs=6)
    texts = (str(prompt) for prompt in edits(folder))
    rows = [{"prompt": text, "source_images": [f"{number}-0.png"]} for number, text in enumerate(texts)]
    (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def written(folder: Path) -> dict[str, str]:
    """Hash of every file below ``out``."""
    files = [path for path in sorted((folder / "out").rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(1, reversed(COMMANDS)))
def test_workers_write_the_files_of_one_process(
    name: str, cluster: Any, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for number in (1, 2):
        folder = Path(shutil.copytree(inputs, tmp_path / str(number)))
        monkeypatch.chdir(folder)
        main([*COMMANDS[name], "--device=cpu", f"--workers={number}"])
        found.append(written(folder))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_part_whose_worker_is_killed_is_done_again(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = squares(tmp_path, workers=1)
    assert capsys.readouterr().out == "from 100\n"
    found = squares(tmp_path, "once", 4)
    assert {part: (value, threads) for part, (value, _, threads) in found.items()} == {
        part: (value, threads) for part, (value, _, threads) in whole.items()
    }
    assert os.getpid() not in {process for _, process, _ in found.values()}
    out, error = capsys.readouterr()
    assert "from 100" not in out and error.splitlines() == ["a worker has ended: another one does its part"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "said"),
    rotated_after(
        2,
        [
            ("always", "a part failed 3 times: "),
            ("wrong input", "the disk is on fire; put it out (worker "),
            (
                "defect",
                "a part failed 3 times: ZeroDivisionError: by zero (" + str(Path(__file__).with_name("toy_work.py")),
            ),
            ("absent", "[Errno 2] No such file or directory: "),
            ("other files", "model false in the first process, true in this worker; make both the same (worker "),
        ],
    ),
)
def test_what_ends_a_run_is_said_in_one_line(trouble: str, said: str, cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        squares(tmp_path, trouble)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
    assert len([*tmp_path.glob("try_*")]) == (3 if trouble == "defect" else 0)


def test_files_of_workers_count_by_their_contents(tmp_path: Path) -> None:
    """Equal copies have other times; other contents have the same path."""
    weights, named = tmp_path / "model" / "weights.safetensors", {"policy": [str(tmp_path / "model")], "seed": 1}
    weights.parent.mkdir()
    weights.write_bytes(b"first")
    first = files_named(named)
    os.utime(weights, (0, 0))
    assert files_named(named) == first and [*first] == named["policy"]
    weights.write_bytes(b"other")
    assert files_named(named) != first


@pytest.mark.slow
def test_a_node_that_leaves_costs_its_parts(cluster: Any, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=2)

    def leave(done: int) -> None:
        if done == 3:
            cluster.remove_node(node, allow_graceful=False)

    found = squares(tmp_path, "node", 4, leave)
    assert {part: value for part, (value, _, _) in found.items()} == {n: 100 + n**2 for n in range(PARTS)}
