"""``latentreward serve``: serve reward models over HTTP."""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from latentreward.apps.serving.settings import RewardToServe, ServiceSettings, bind, is_loopback
from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError
from latentreward.core.settings.functions import run_function
from latentreward.core.storage.json_files import checked_token, token_of_file
from latentreward.reward import ModelSource, PublishedSettings

TOKEN_VARIABLE = "LATENTREWARD_TOKEN"


def serve(
    model: PathText | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    base: PathText | None = None,
    run_config: PathText | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    published: PublishedSettings | None = None,
    token_file: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    name: str = "reward",
    rewards: dict[str, RewardToServe] | None = None,
    **limits: Any,
) -> None:
    """Serve scores of reward models over HTTP until SIGTERM or Ctrl-C; requests in progress are finished first.

    POST /v1/score takes latents and prompt embeddings by verl-omni's latent-reward protocol version 1; POST
    /v1/score_latents takes latents and raw prompts, /v1/score_states the states of whole trajectories, and
    /v1/score_images images and prompts. POST /score answers UniRL's clients, /compute Flow-Factory's. GET /v1/rewards
    describes the rewards, /healthz tells whether the server is ready, /metrics has counters for Prometheus, /docs
    describes all routes. Requests are batched into shared forward passes; a score does not depend on the other requests
    of its batch.

    Args:
        model: Folder or hub id of a reward model, or a checkpoint, or the folder of a run; exclusive with ``rewards``.
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
        name: Name of the model in addresses, replies and metrics.
        rewards: Several rewards by name, each with its model and device; the first scores requests that name none. See
            :class:`~latentreward.apps.serving.settings.RewardToServe`.
        limits: See :class:`~latentreward.apps.serving.settings.ServiceSettings`.

    Raises:
        InputError: If a setting is wrong, the port is taken, or a model cannot be loaded.
    """
    modules = ("fastapi", "prometheus_client", "uvicorn")
    if missing := [module for module in modules if find_spec(module) is None]:
        raise InputError(f"serve needs {missing[0]}, which is not installed; pip install 'latentreward[serve]'")
    import torch

    from latentreward.apps.serving.app import serve_until_stopped
    from latentreward.apps.serving.service import ScoringService
    from latentreward.core.running import find_device
    from latentreward.reward import RewardModel

    token = os.environ.get(TOKEN_VARIABLE)
    if token_file is not None:
        token = token_of_file(token_file, "token_file")
    elif token is not None:
        token = checked_token(token, TOKEN_VARIABLE)
    settings = ServiceSettings(token=token, **limits)
    if (model is None) == (not rewards):
        raise InputError("give either model, or rewards with a name, model and device for each")
    single = RewardToServe(model or "", device, dtype, base, run_config, revision, published)
    if rewards and (single, name) != (RewardToServe(""), "reward"):
        raise InputError("name, device, base and the like are those of a single model; give them for each of rewards")
    chosen = rewards or {name: single}
    if wrong := [label for label in chosen if not re.fullmatch(r"[\w.-]+", label)]:
        raise InputError(f"the reward's name {wrong[0]!r} cannot stand in an address; give letters, digits and . _ -")
    for one in chosen.values():
        find_device(one.device)
    with bind(host, port) as bound:
        if settings.token is None and not is_loopback(bound.getsockname()[0]):
            print(
                f"latentreward serve: {host} can be reached from other machines, and there is no token: anybody who "
                f"reaches it may send requests; set token_file or {TOKEN_VARIABLE}",
                file=sys.stderr,
            )
        loaded = {}
        for label, one in chosen.items():
            source = ModelSource(one.model, one.run_config, one.base, one.revision, trust_remote_code, one.published)
            target = find_device(one.device)
            print(f"loading {source.path} on {target}", flush=True)
            loaded[label] = RewardModel.from_pretrained(source, device=target, dtype=getattr(torch, one.dtype))
            loaded[label].require_images("serve")
        serve_until_stopped(ScoringService(loaded, settings), bound)
    print("stopped", flush=True)


run = partial(run_function, serve, classes=False)
