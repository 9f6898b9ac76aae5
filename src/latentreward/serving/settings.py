"""Settings of a server; this module can be imported without the extra ``serve``."""

import math
from dataclasses import dataclass

from latentreward.errors import InputError


@dataclass(frozen=True)
class ServiceSettings:
    """Limits of a server, and the noise of requests without a seed.

    Attributes:
        batch_size: Greatest number of rows (images or latents) per forward pass of the model.
        max_wait_ms: Milliseconds that a row waits at most for other rows to share its forward pass.
        max_pass_s: Seconds that a forward pass should take at most, as estimated from earlier rows of equal size. A
            row that takes longer gets a forward pass alone. A smaller value lowers the time that a short request waits
            for the running pass.
        queue: Greatest number of waiting rows; requests beyond it are answered 503 with Retry-After.
        timeout: Seconds after which a request is answered 504, or 408 if its body has not arrived.
        max_body_mb: Largest body, in MiB.
        max_latent_pixels: Largest h · w of latents, or T · h · w with a time axis, in latent pixels.
        fresh_noise: Whether latents of a request without a seed get new noise each time; otherwise their seed is 0.
        token: Token that requests must give as ``Authorization: Bearer TOKEN``; None allows requests without a token.

    Raises:
        InputError: If ``max_wait_ms`` is negative, another limit is not positive, or a limit is not finite.
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
        """Size of the largest body, in bytes."""
        return int(self.max_body_mb * 2**20)
