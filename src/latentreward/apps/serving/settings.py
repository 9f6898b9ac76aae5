"""Settings of the HTTP server and its address; they need no extra."""

import socket
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, check_range
from latentreward.data.images import MAX_PIXELS
from latentreward.reward import PublishedSettings


@dataclass(frozen=True)
class ServiceSettings:
    """Limits of a server.

    Attributes:
        batch_size: Greatest number of rows (images or latents) per forward pass of a reward.
        max_wait_ms: Milliseconds that a row waits at most for other rows to share its forward pass.
        queue: Greatest number of waiting rows of a reward; requests beyond it are answered 503 with Retry-After.
        timeout: Seconds that the body may take to arrive (else 408), and images to be decoded and rows to be scored
            (else 504 for each). A request that would wait longer for others is answered 503 at once.
        max_body_mb: Largest body, in MiB; all requests together have 16 times as much memory.
        max_pixels: Largest width × height of an image, which is read from its header before the image is decoded.
        max_latent_pixels: Largest h · w of latents, or T · h · w with a time axis, in latent pixels; with pictures to
            edit, of all of a row together. None takes four times the size that the reward was trained at.
        token: Token that requests must give as ``Authorization: Bearer TOKEN``; None allows requests without a token.
    """

    batch_size: int = 8
    max_wait_ms: float = 10.0
    queue: int = 256
    timeout: float = 60.0
    max_body_mb: float = 64.0
    max_pixels: int = MAX_PIXELS
    max_latent_pixels: int | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if type(value) in (int, float)}
        check_range("(0, inf)", **{name: value for name, value in numbers.items() if name != "max_wait_ms"})
        check_range("[0, inf)", max_wait_ms=self.max_wait_ms)

    @property
    def max_body(self) -> int:
        """Size of the largest body, in bytes."""
        return int(self.max_body_mb * 2**20)


@dataclass(frozen=True)
class RewardToServe:
    """One of several rewards of a server.

    Attributes:
        model: Folder or hub id of a reward model, or a checkpoint, or the folder of a run.
        device: Device, e.g. ``cuda:1``; ``auto`` takes an accelerator if there is one.
        dtype: Precision of the model's backbone.
        base: Pipeline with the frozen base weights, a folder or hub id; by default the one that the model names.
        run_config: Config file of the model's training run; by default the one beside the checkpoint.
        revision: Branch, tag or commit of a hub id.
        published: Settings that the files of a published layout do not hold.
    """

    model: PathText
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    base: PathText | None = None
    run_config: PathText | None = None
    revision: str | None = None
    published: PublishedSettings | None = None


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to an address, with port 0 to any free port; connections are accepted only after ``listen``."""
    if not 0 <= port < 2**16:  # getaddrinfo would take another port, the rest of a division
        raise InputError(f"port={port} is no port; choose one from 1 to {2**16 - 1}, or 0 for a free one")
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, number)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name with an empty or too long part
        raise InputError(f"cannot serve at {host}:{port} ({error}); choose another --port or --host") from error
    return bound


def is_loopback(host: str) -> bool:
    """Tell whether an IP address, perhaps with a zone, is one by which only this machine can be reached."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:  # a name
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
