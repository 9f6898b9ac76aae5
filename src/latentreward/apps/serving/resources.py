"""What all rewards of a server share: the memory of requests, the metrics, and turns on each device."""

import asyncio

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from latentreward.apps.serving.bodies import BodyReader, MemoryBudget
from latentreward.apps.serving.settings import ServiceSettings

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Bucket bounds of the histogram of answer times, in seconds."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # bucket bounds of the histogram of batch sizes, in rows


class ServerMetrics:
    """Prometheus metrics of a server's requests and batches, in a registry of their own.

    The metrics whose names begin with ``reward_`` have the label ``reward``; the others count all rewards together.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        about = {"namespace": "latentreward", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered.", ["path", "status"], **about)
        self.seconds = Histogram("request_seconds", "Seconds to an answer.", ["path"], buckets=SECONDS, **about)
        self._batch_rows = Histogram("batch_rows", "Rows of a pass of the model.", buckets=ROWS, **about)
        self.queue_rows = Gauge("queue_rows", "Rows that wait.", **about)
        self._passes = Counter("reward_passes", "Passes of a reward.", ["reward"], **about)
        self._rows = Counter("reward_rows", "Rows scored by a reward.", ["reward"], **about)
        self.refused = Counter("reward_refused", "Requests that a reward had no room for.", ["reward"], **about)
        self._prompts = Counter("reward_prompts", "Prompts of passes, kept or encoded.", ["reward", "from"], **about)
        self.reward_queue_rows = Gauge("reward_queue_rows", "Rows that wait for a reward.", ["reward"], **about)
        self.reward_requests_now = Gauge("reward_requests_now", "Requests of a reward now.", ["reward"], **about)

    def count_pass(self, reward: str, rows: int) -> None:
        """Count a pass of a reward and its rows."""
        self._batch_rows.observe(rows)
        self._passes.labels(reward).inc()
        self._rows.labels(reward).inc(rows)

    def count_prompts(self, reward: str, kept: int, encoded: int) -> None:
        """Count the prompts of a pass: those whose embeddings were kept, and those that were encoded."""
        self._prompts.labels(reward, "kept").inc(kept)
        self._prompts.labels(reward, "encoded").inc(encoded)


class Resources:
    """Memory, metrics and devices that the rewards of a server share.

    Attributes:
        settings: Limits of the server.
        metrics: Metrics of all requests and rewards.
        memory: Budget for the bodies of requests and what they become; it has room for 16 of the greatest length.
        bodies: Reader of bodies within the budget.
        decoders: Turns of requests whose images are decoded, four at the same time.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings, self.metrics = settings, ServerMetrics()
        self.memory = MemoryBudget(16 * settings.max_body)
        self.bodies = BodyReader(settings.max_body, settings.timeout, self.memory)
        self.decoders = asyncio.Semaphore(4)
        self._turns: dict[torch.device, asyncio.Semaphore] = {}

    def turns(self, device: torch.device) -> asyncio.Semaphore:
        """Return the turns of a device: ``passes_per_device`` rewards on it compute at the same time, in order."""
        return self._turns.setdefault(device, asyncio.Semaphore(self.settings.passes_per_device))
