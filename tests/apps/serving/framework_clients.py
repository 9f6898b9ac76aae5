"""Clients of other frameworks, rebuilt from their sources: what they send, and what they accept as an answer.

UniRL: ``unirl/reward/remote.py`` at 0e713d6. Flow-Factory: ``src/flow_factory/rewards/my_reward_remote.py`` at a0b2bc5.
"""

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from PIL import Image

MARKS = ("request_id", "sample_id", "group_id", "source_rank", "policy_version", "idempotency_key")


def encoded(image: Image.Image, kind: str = "png") -> str:
    """An image in base64; UniRL sends JPEG of quality 95, Flow-Factory PNG."""
    stream = io.BytesIO()
    image.save(stream, kind, **({"quality": 95} if kind == "jpeg" else {}))
    return base64.b64encode(stream.getvalue()).decode()


class UniRLClient:
    """UniRL's remote backend for images: one mean of the wanted rewards per sample, weighted."""

    def __init__(self, url: str, weights: Mapping[str, float]) -> None:
        self.url, self.weights = url, dict(weights)

    def missing(self) -> list[str]:
        """Wanted rewards that the server does not name; checked before training."""
        reply = httpx.get(f"{self.url}/health", timeout=5)
        assert reply.status_code == 200, reply.text
        named = reply.json()["rewards"]
        assert isinstance(named, dict)
        return [name for name in self.weights if name not in named]

    def payload(self, prompts: Sequence[str], images: Sequence[Image.Image], kind: str = "jpeg") -> dict[str, Any]:
        samples = []
        for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            data = encoded(image, kind)
            marks = {
                "request_id": f"sample-{number}",
                "sample_id": f"sample-{number}",
                "group_id": "group-0",
                "source_rank": 0,
                "policy_version": None,
                "scorer_version": None,
                "idempotency_key": hashlib.sha256(data.encode()).hexdigest(),
            }
            history = [{"text": prompt, "image_b64": data}]
            wanted = {"required_rewards": list(self.weights), "metadata": {"domain": ["x", 1, None]}}
            samples.append({"history": history, **wanted, **marks})
        return {"protocol_version": "1", "requests": samples}

    def rewards(self, prompts: Sequence[str], images: Sequence[Image.Image], kind: str = "jpeg") -> list[float]:
        sent = self.payload(prompts, images, kind)
        reply = httpx.post(f"{self.url}/score", json=sent, timeout=300)
        reply.raise_for_status()
        return [self._reward(*row) for row in self.checked(sent["requests"], reply.json())]

    def checked(self, sent: Sequence[dict[str, Any]], reply: dict[str, Any]) -> list[tuple[dict[str, Any], Any]]:
        """Results and errors of each sample, after the client's checks."""
        assert reply["protocol_version"] == "1"
        results, errors, identities = reply["results"], reply["errors"], reply["identities"]
        assert len(results) == len(errors) == len(identities) == len(sent)
        for sample, identity in zip(sent, identities, strict=True):
            assert all(identity[mark] == sample[mark] for mark in MARKS)
        return list(zip(results, errors, strict=True))

    def _reward(self, result: dict[str, dict[str, float]], errors: dict[str, str]) -> float:
        assert not errors, errors
        total = 0.0
        for name, weight in self.weights.items():
            values = list(result[name].values())
            assert all(type(value) in (int, float) and math.isfinite(value) for value in values)
            total += weight * values[0]
        return total / sum(self.weights.values())


class FlowFactoryClient:
    """Flow-Factory's remote client."""

    def __init__(self, url: str) -> None:
        self.url = url

    def healthy(self) -> bool:
        return httpx.get(f"{self.url}/health", timeout=5).is_success

    def payload(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> dict[str, Any]:
        none = dict.fromkeys(("video", "condition_images", "condition_videos"))
        return {"prompt": list(prompts), "image": [encoded(image) for image in images] or None, **none}

    def compute(self, prompts: Sequence[str], images: Sequence[Image.Image], **more: Any) -> list[float]:
        reply = httpx.post(f"{self.url}/compute", json=self.payload(prompts, images) | more, timeout=300)
        reply.raise_for_status()
        assert not reply.json().get("error")
        return reply.json()["rewards"]
