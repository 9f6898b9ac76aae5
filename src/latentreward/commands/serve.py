"""``latentreward serve``: serve a reward model over HTTP."""

import os
import sys
from functools import partial
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from latentreward.errors import InputError
from latentreward.scoring import PublishedSettings
from latentreward.serving.settings import ServiceSettings
from latentreward.settings.functions import run_plain_function

TOKEN_VARIABLE = "LATENTREWARD_TOKEN"


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    base: str | None = None,
    run_config: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    published: PublishedSettings | None = None,
    token_file: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    **limits: Any,
) -> None:
    """Serve scores of a reward model over HTTP until SIGTERM or Ctrl-C; requests in progress are finished first.

    POST /v1/score takes latents and prompt embeddings by verl-omni's latent-reward protocol version 1; POST
    /v1/score_images takes images and prompts, as a form or as JSON. GET /v1/model describes the model, /healthz tells
    whether the server is ready, /metrics has counters for Prometheus. Requests are batched into shared forward passes;
    a score does not depend on the other requests of its batch.

    Args:
        model: Folder or hub id of a reward model, or a checkpoint, or the folder of a run.
        host: Address to listen on; the default accepts connections from this machine only.
        port: Port to listen on; 0 takes a free port and prints it.
        base: Pipeline with the frozen base weights, a folder or hub id; by default the one that the model names.
        run_config: Config file of the model's training run; by default the one beside the checkpoint.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether to import classes that the model's settings name and that are not registered;
            importing runs their code.
        published: Settings that the files of a published layout do not hold, e.g. --published.guidance 1.
        token_file: File with a token that clients must send in the header Authorization: Bearer. By default the token
            is the value of the environment variable LATENTREWARD_TOKEN; without file and variable, everybody who
            reaches the port may send requests.
        dtype: Precision of the model's backbone.
        device: Device, e.g. cuda:1; auto takes an accelerator if there is one.
        limits: See :class:`~latentreward.serving.settings.ServiceSettings`.

    Raises:
        InputError: If a setting is wrong, the port is taken, or the model cannot be loaded.
    """
    modules = ("fastapi", "prometheus_client", "python_multipart", "uvicorn")
    if missing := [name for name in modules if find_spec(name) is None]:
        raise InputError(f"serve needs {missing[0]}, which is not installed; pip install 'latentreward[serve]'")
    import torch

    from latentreward.devices import find_device
    from latentreward.scoring import RewardModel
    from latentreward.serving.addresses import bind
    from latentreward.serving.server import serve as serve_until_stopped
    from latentreward.serving.service import ScoringService

    settings = ServiceSettings(token=_token(token_file), **limits)
    target = find_device(device)
    with bind(host, port) as bound:
        if settings.token is None and not ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback:
            print(
                f"latentreward serve: {host} can be reached from other machines, and there is no token: anybody who "
                f"reaches it may send requests; set token_file or {TOKEN_VARIABLE}",
                file=sys.stderr,
            )
        print(f"loading {model} on {target}", flush=True)
        reward = RewardModel.from_pretrained(
            model,
            revision=revision,
            base=base,
            config=run_config,
            device=target,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            published=published,
        )
        reward.require_images("serve")
        serve_until_stopped(ScoringService(reward, settings), bound)
    print("stopped", flush=True)


def _token(file: Path | None) -> str | None:
    if file is None:
        token, source = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    else:
        try:
            token, source = file.read_text().strip(), f"token_file={file}"
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"token_file={file} cannot be read ({error}); give a text file") from error
    if token is not None and not (token and token.isascii() and token.isprintable()):
        raise InputError(f"{source} must hold a token of printable ASCII characters")
    return token


run = partial(run_plain_function, serve)
