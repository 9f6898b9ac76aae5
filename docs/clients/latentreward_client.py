"""Client of ``latentreward serve``, to copy beside your training code; needs torch, numpy, Pillow and safetensors."""

import base64
import http.client
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

Prompts = str | Sequence[str]
ROUNDING = 1e-3
"""How far values of images may lie outside [0, 1]."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib would send the token to the other server too."""

    def redirect_request(self, *_: Any) -> None:
        """Return None, so that a redirect is an error."""


class RewardClient:
    """Asks a server for scores; one object may be used from several threads.

    Args:
        url: Address of the server, e.g. ``http://127.0.0.1:8000``.
        reward: Name of a reward of the server; None takes its first.
        token: Token of the server; None sends none.
        timeout: Seconds to wait for an answer.
        retries: Number of times that a request is sent again after 503, 504 or a broken connection.
        rows: Greatest number of images, latents or states per request; a trajectory is not split.

    Raises:
        ValueError: If the address is not one of http or https.
    """

    def __init__(
        self,
        url: str,
        reward: str | None = None,
        token: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        rows: int = 16,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r} is no address; give one such as http://127.0.0.1:8000")
        self._url = url.rstrip("/") + ("" if reward is None else f"/rewards/{urllib.parse.quote(reward)}")
        self._token, self._timeout, self._retries, self._rows = token, timeout, retries, rows
        no_proxies = urllib.request.ProxyHandler({})  # proxies cannot reach clusters
        self._opener = urllib.request.build_opener(no_proxies, _NoRedirects)

    def score_images(self, prompts: Prompts, images: Any) -> Tensor:
        """Score N images; the server encodes them by its VAE.

        Args:
            prompts: N prompts, or one for all.
            images: PIL images, paths of image files, uint8 arrays ``(N, H, W, 3)``, or a tensor ``(N, 3, H, W)`` of
                floats in [0, 1]; or a single one without N.

        Returns:
            Scores ``(N,)``, float32 on the CPU.

        Raises:
            ValueError: If a tensor has values outside [0, 1], arrays are not uint8, or a shape is another.
        """
        encoded = [base64.b64encode(_png(image)).decode() for image in _pictures(images)]
        texts, scores = _each(prompts, len(encoded)), []
        for part in self._parts(len(encoded), 1):
            body = json.dumps({"prompts": texts[part], "images": encoded[part]}).encode()
            scores += self._ask("/v1/score_images", body, "application/json")["scores"]
        return torch.tensor(scores)

    def score_latents(
        self, prompts: Prompts, latents: Tensor, u: float | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Score N clean latents; the server encodes the prompts.

        Args:
            prompts: N prompts, or one for all.
            latents: ``(N, C, ...)`` clean, scaled latents of the reward's VAE.
            u: Noise level in [0, 1]; None takes the reward's own levels.
            seeds: N seeds of the noise, with ``u`` only.

        Returns:
            Scores ``(N,)``, float32 on the CPU.
        """
        tensors = {"latents": latents}
        if u is not None:
            tensors["u"] = torch.full((len(latents),), u)
        if seeds is not None:
            tensors["seeds"] = torch.tensor(seeds)
        return self._score_tensors("/v1/score_latents", _each(prompts, len(latents)), tensors)

    def score_states(self, prompts: Prompts, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Score the S noisy states of N trajectories.

        Args:
            prompts: N prompts, or one for all.
            latents: ``(N, S, C, ...)`` states, scaled as the reward's VAE scales.
            timesteps: ``(S,)`` or ``(N, S)``; in flow matching 1000 times the noise level.

        Returns:
            Scores ``(N, S)``, float32 on the CPU.
        """
        tensors = {"latents": latents, "timesteps": timesteps.float().expand(len(latents), -1)}
        return self._score_tensors("/v1/score_states", _each(prompts, len(latents)), tensors, latents.shape[1])

    def _score_tensors(self, path: str, prompts: list[str], tensors: dict[str, Tensor], states: int = 1) -> Tensor:
        scores = []
        for part in self._parts(len(prompts), states):
            rows = {name: tensor[part].detach().cpu().contiguous() for name, tensor in tensors.items()}
            body = save(rows, metadata={"prompts": json.dumps(prompts[part])})
            scores += self._ask(path, body, "application/octet-stream")["scores"]
        return torch.tensor(scores)

    def _parts(self, count: int, states: int) -> list[slice]:
        size = max(1, self._rows // max(1, states))
        return [slice(start, start + size) for start in range(0, count, size)]

    def _ask(self, path: str, body: bytes, kind: str) -> dict[str, Any]:
        headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {self._token}"} if self._token else {})
        request = urllib.request.Request(self._url + path, body, headers)
        for attempt in range(self._retries + 1):
            try:
                with self._opener.open(request, timeout=self._timeout) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                told, wait = error.read().decode(errors="replace")[:500], error.headers.get("Retry-After", "")
                if error.code not in (503, 504) or attempt == self._retries:
                    raise RuntimeError(f"{self._url}{path} answered {error.code}: {told}") from error
                time.sleep(float(wait) if wait.isdecimal() else 1.0)  # a proxy may give a date
            except (OSError, http.client.HTTPException) as error:
                if attempt == self._retries:
                    raise RuntimeError(f"{self._url}{path} cannot be reached: {error}") from error
                time.sleep(1.0)
        raise AssertionError


def _each(prompts: Prompts, count: int) -> list[str]:
    texts = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if len(texts) != count:
        raise ValueError(f"{len(texts)} prompts for {count} rows; give one each, or one for all")
    return texts


def _pictures(images: Any) -> list[Image.Image]:
    if isinstance(images, Image.Image | str | Path):
        images = [images]
    elif getattr(images, "ndim", None) == 3:  # a single one, as array or tensor
        images = images[None]
    if isinstance(images, Tensor):
        if not images.is_floating_point():
            raise ValueError(f"images are a tensor of {images.dtype}; give floats in [0, 1], or uint8 as an array")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are a tensor of shape {(*images.shape,)}; give (N, 3, H, W)")
        values = images.detach().float()
        if not bool(((values > -ROUNDING) & (values < 1 + ROUNDING)).all()):  # NaN too
            raise ValueError(
                f"images are a tensor from {float(values.min()):g} to {float(values.max()):g}; give finite values in "
                "[0, 1]: divide pixels by 255, and take x / 2 + 0.5 of x in [-1, 1]"
            )
        images = (values * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [_picture(image) for image in images]


def _picture(image: Any) -> Image.Image:
    if isinstance(image, Image.Image | str | Path):
        return image if isinstance(image, Image.Image) else Image.open(image)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        given = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"an image is an array of {given}; give uint8 of shape (H, W, 3), or a tensor of all")
    return Image.fromarray(array)


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    # With its orientation, by which the server turns the image as its reward was trained.
    image.convert("RGB").save(stream, "png", compress_level=1, exif=image.getexif())
    return stream.getvalue()
