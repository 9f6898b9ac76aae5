"""Run one command of ``latentreward`` in this process, and write what it held after the imports.

Usage: ``python process.py RESULT.json COMMAND ARGUMENT ...``. The process that starts this one watches its memory.
"""

import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
from base64 import b64encode
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from memory import proportional

from latentreward.apps.cli import main, module_of

USED = (
    "datasets",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.transformers.transformer_sd3",
    "diffusers.models.unets.unet_2d_condition",
    "latentreward.diffusion.cache",
    "latentreward.callbacks",
    "latentreward.diffusion.encoders.prompts",
    "latentreward.diffusion.encoders.prompts",
    "latentreward.reward.modules.reward",
    "latentreward.reward.scoring.reward_model",
    "lightning.pytorch.cli",
    "peft",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
)
"""Modules that commands import when they need them."""


def ask_once(port: int, picture: Path, prompt: str) -> None:
    """Wait for a server of this process, ask it for the score of a picture, and let it stop."""
    address = f"http://127.0.0.1:{port}"
    body = json.dumps({"prompt": prompt, "images": [b64encode(picture.read_bytes()).decode()]}).encode()
    try:
        while True:
            try:
                urlopen(f"{address}/healthz", timeout=60).close()
                break
            except OSError:
                time.sleep(0.2)
        with urlopen(
            Request(f"{address}/v1/score_images", body, {"Content-Type": "application/json"}), timeout=600
        ) as answer:
            print(f"answer: {answer.read().decode()}", flush=True)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def free_port() -> int:
    """Return a port that no program listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(result: Path, arguments: list[str]) -> None:
    """Import what the command needs, note the memory, and run the command."""
    for name in (*USED, module_of(arguments[0])):
        importlib.import_module(name)
    found: dict[str, Any] = {"imports": proportional()}
    result.write_text(json.dumps(found))
    if arguments[0] == "serve":
        data = Path("..", "data", "hpdv3")
        row = json.loads((data / "test.json").read_text())[0]
        arguments = [*arguments, f"--port={(port := free_port())}"]
        threading.Thread(target=ask_once, args=(port, data / row["path1"], row["prompt"]), daemon=True).start()
    main(arguments)
    if torch.cuda.is_available():
        result.write_text(json.dumps(found | {"allocated": torch.cuda.max_memory_allocated()}))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
