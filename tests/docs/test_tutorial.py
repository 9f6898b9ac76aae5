"""docs/tutorial.md: its commands, run as a reader would run them, with less data and fewer steps."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import start

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
SHORTER = {
    '("train", "train", 4000), ("val", "validation", 500)': '("train", "train", 96), ("val", "validation", 32)',
    "--trainer.default_root_dir runs/first": "--trainer.default_root_dir runs/first --trainer.max_steps 3",
    "--trainer.default_root_dir runs/aligned": "--trainer.default_root_dir runs/aligned --trainer.max_steps 2"
    " --data.batch_size 8 --data.prompts_per_rollout 8",
    "--images_per_prompt 4": "--images_per_prompt 4 --sampling.num_inference_steps 4",
    "--config configs/evaluate/tiny.yaml": "--config configs/evaluate/tiny.yaml --num_prompts 4"
    " --sampling.num_inference_steps 4",
    "--data my_pairs --model": "--levels [0.4] --data my_pairs --model",
}


PROGRAM = """#!{python} -IS
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    command = [sys.argv[1:], os.getcwd(), dict(os.environ)]
    socket.send_fds(connection, [json.dumps(command).encode()], [1])
    answers = connection.makefile()
    process = int(answers.readline())
    signal.signal(signal.SIGTERM, lambda *_: os.kill(process, signal.SIGTERM))
    sys.exit(int(answers.readline()) % 256)
"""
"""Stands for ``latentreward``: has the command run in a process that need not import everything again."""


@contextmanager
def program(folder: Path) -> Iterator[None]:
    """``latentreward`` in ``folder`` (see :data:`PROGRAM`), as long as the context lasts."""
    address = str(folder / "address")
    (folder / "latentreward").write_text(PROGRAM.format(python=sys.executable, address=address))
    (folder / "latentreward").chmod(0o755)

    def run(connection: socket.socket) -> None:
        message, (output, *_), _, _ = socket.recv_fds(connection, 2**20, 1)
        arguments, cwd, environment = json.loads(message)
        place = {"cwd": Path(cwd), "output": Path(f"/proc/{os.getpid()}/fd/{output}")}
        process = start(arguments, environment=environment, **place)
        connection.sendall(f"{process.pid}\n".encode())
        status = process.wait()
        os.close(output)
        connection.sendall(f"{status}\n".encode())
        connection.close()

    def serve(listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:  # closed
                return
            threading.Thread(target=run, args=(connection,), daemon=True).start()

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        yield
        listening.shutdown(socket.SHUT_RDWR)


def shortened(text: str) -> str:
    for long, short in SHORTER.items():
        assert text.count(long) == 1, long
        text = text.replace(long, short)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return text.replace("8000", str(found.getsockname()[1]))


@pytest.mark.rotated
@pytest.mark.slow
def test_every_command_of_the_tutorial_runs(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = shortened(PAGE.read_text())
    for name, code in re.findall(r"<!-- (\S+) -->\n```python\n(.*?)```", text, flags=re.DOTALL):
        (tmp_path / name).write_text(code)
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 7
    places = [str(tmp_path_factory.mktemp("bin")), str(Path(sys.executable).parent), os.environ["PATH"]]
    with program(Path(places[0])):
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": os.pathsep.join(places)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-3000:]}"
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["protocols"]
    assert "z_score" in (tmp_path / "scores.csv").read_text().splitlines()[0]
    assert "pictures/" in (tmp_path / "scores.html").read_text()
    assert (tmp_path / "judged" / "report.html").is_file()
    assert '"scores"' in run.stdout, run.stdout[-500:]
