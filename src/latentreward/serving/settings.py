"""Settings of a server; nothing here needs the extra ``serve``."""

import math
from dataclasses import dataclass

from latentreward.errors import InputError


@dataclass(frozen=True)
class ServiceSettings:
    """Limits of a server, and the noise of requests without a seed.

    Attributes:
        batch_size: Rows (images or latents) per pass of the model, at most.
        max_wait_ms: Milliseconds that a row waits for others to share its pass.
        max_pass_s: Seconds that a pass may take, by what its rows took before; a row that takes longer has one alone.
            What waits for the model waits for the running pass at least.
        queue: Rows that may wait; further requests are answered 503 with Retry-After.
        timeout: Seconds after which a request is answered 504; a body that takes as long to arrive, 408.
        max_body_mb: Largest body, in MiB.
        max_latent_pixels: Largest h · w of latents.
        fresh_noise: Whether latents of a request without a seed get new noise each time; otherwise their seed is 0.
        token: What ``Authorization: Bearer`` must give; None lets anybody in.

    Raises:
        InputError: If a limit is not positive and finite.
    """

    batch_size: int = 8
    max_wait_ms: float = 10.0
    max_pass_s: float = 2.0
    queue: int = 256
    timeout: float = 60.0
    max_body_mb: float = 64.0
    max_latent_pixels: int = 128 * 128
    fresh_noise: bool = False
    token: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_pass_s", "queue", "timeout", "max_body_mb", "max_latent_pixels"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name):g} must be a finite number greater than 0")
        if not 0 <= self.max_wait_ms < math.inf:
            raise InputError(f"max_wait_ms={self.max_wait_ms:g} must be a finite number from 0 on")

    @property
    def max_body(self) -> int:
        """Bytes of the largest body."""
        return int(self.max_body_mb * 2**20)
