"""Scorers by a function of the user's, by a column of a file, and by a server."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import isbuiltin, isfunction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from latentreward.core.contracts import PreferencePair
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.core.storage.digests import digest
from latentreward.data.score_table import PAIR_ID, SIDES, numbers, read_table
from latentreward.reward.remote.client import RemoteImages, RemoteServer
from latentreward.reward.remote.schemas import PlainJSON
from latentreward.reward.scorers.base import ImageScorer, TableScorer, code_of

IMAGE_KEY, PROMPT = "image_key", "prompt"


class CallableScorer(ImageScorer):
    """A scorer that calls any function, or an object with ``__call__``.

    Args:
        function: Called as ``function(prompts, images)`` with B prompts and B RGB images (PIL); returns a tensor
            ``(B,)``, higher is better. In YAML: the dotted path of the function, or ``class_path`` and ``init_args`` of
            the object.
        name: Name of the scores in tables.
        uses_prompt: Whether the score depends on the prompt.
        batch_size: Greatest number of images per call.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, *, uses_prompt: bool = True, batch_size: int = 32
    ) -> None:
        super().__init__(name, batch_size)
        if not callable(function):
            raise InputError(f"function of {name} is {function!r}; give something that can be called")
        self.function, self.uses_prompt = function, uses_prompt
        self._settings = settings_of(function)  # as given: calls may change the object

    def identity(self) -> str:
        named = code_of(self.function)
        return f"{type(self).__name__} {named.__module__}.{named.__qualname__}{self._settings}"

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        return self.function(prompts, images)


def settings_of(function: Any) -> str:
    """Return a hash of the settings of a callable object, method or partial function; empty for one without.

    Settings are arguments of a partial function with the settings of what it calls, and public attributes that are
    plain values. Their texts may be secrets, so they are hashed.
    """
    settings, inner = dict[Any, Any](), ""
    if isinstance(function, partial):
        settings, inner = {**dict(enumerate(function.args)), **function.keywords}, settings_of(function.func)
    elif not isfunction(function) and not isbuiltin(function):
        settings = getattr(getattr(function, "__self__", function), "__dict__", {})
    kept = {name: value for name, value in settings.items() if not str(name).startswith("_") and is_plain_value(value)}
    return (f", {digest([repr(kept)])}" if kept else "") + inner


def is_plain_value(value: Any) -> bool:
    """Tell whether a value is a text, number, path or None, or a collection of such; its text then tells it apart."""
    if isinstance(value, dict):
        return all(map(is_plain_value, chain(value, value.values())))
    if isinstance(value, list | tuple):
        return all(map(is_plain_value, value))
    return isinstance(value, str | int | float | Path | None)


class TableColumn(TableScorer):
    """A scorer that reads scores computed elsewhere, e.g. VQA scores, from a table.

    The file is CSV, JSON lines or parquet, with one row per pair or one row per image. A table of pairs has the columns
    ``pair_id``, ``COLUMN_a`` and ``COLUMN_b``. A table of images has the columns ``image_key`` and ``COLUMN``, and
    ``prompt`` if the score depends on the prompt.

    Args:
        path: File that ends in ``.csv``, ``.jsonl`` or ``.parquet``.
        column: Name COLUMN of the score, without ``_a`` and ``_b``.
        name: Name of the scores in tables that are written; ``column`` by default.
    """

    def __init__(self, path: str | Path, column: str, *, name: str | None = None) -> None:
        super().__init__(name or column)
        self.path, self.column = Path(path), column
        table = read_table(self.path)
        self._by_pair = PAIR_ID in table.column_names
        if not self._by_pair and IMAGE_KEY not in table.column_names:
            raise InputError(f"{self.path}: no column {PAIR_ID} or {IMAGE_KEY}; it has {', '.join(table.column_names)}")
        self._by_prompt = not self._by_pair and PROMPT in table.column_names
        columns = [f"{self.column}{side}" for side in SIDES] if self._by_pair else [self.column]
        values = zip(*(numbers(table, name, self.path).tolist() for name in columns), strict=True)
        names = (PAIR_ID,) if self._by_pair else (IMAGE_KEY, PROMPT) if self._by_prompt else (IMAGE_KEY,)
        texts = [table.column(name).cast(pa.string()).to_pylist() for name in names]
        keys = texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
        self._scores: dict[Any, tuple[float, ...]] = dict(zip(keys, values, strict=True))
        if repeated := len(keys) - len(self._scores):
            raise InputError(f"{path}: {repeated} rows repeat an earlier {' and '.join(names)}; keep one of each")

    def identity(self) -> str:
        return f"{type(self).__name__} {self.path} {self.column}"

    def lookup(self, pairs: Sequence[PreferencePair]) -> np.ndarray:
        keys: list[Any] = [pair.pair_id for pair in pairs]
        if not self._by_pair:
            sides = [(image.image_key, pair.prompt) for pair in pairs for image in (pair.image_a, pair.image_b)]
            keys = sides if self._by_prompt else [key for key, _ in sides]
        missing = (np.nan, np.nan) if self._by_pair else (np.nan,)
        rows = [self._scores.get(key, missing) for key in keys]
        return np.array(rows, dtype=np.float64).reshape(len(pairs), 2)


class HTTPScorer(ImageScorer):
    """A scorer that sends images to a server: a VLM judge, or ``latentreward serve``.

    Use the scorer as the held-out scorer of :class:`~latentreward.callbacks.HackingMonitor`, and in
    ``evaluate-policy``, ``benchmark`` and ``score-pairs``. For training see
    :class:`~latentreward.alignment.HTTPReward`.

    Args:
        server: Address, limits, token, and how long to try when the server fails.
        schema: Form of requests and replies; None is :class:`~latentreward.reward.PlainJSON`.
        name: Name of the scores in tables.
        batch_size: Images of a request.

    Example:
        .. code-block:: yaml

            held_out:
              class_path: HTTPScorer
              init_args:
                server: {url: "http://judge:8080"}
                name: judge
    """

    def __init__(
        self, server: RemoteServer, schema: PlainJSON | None = None, *, name: str = "http", batch_size: int = 16
    ) -> None:
        check_at_least_one(batch_size=batch_size)
        super().__init__(name, batch_size * server.parallel)
        self.server, self.schema = server, schema or PlainJSON()
        self._images = RemoteImages(server, self.schema, batch_size)

    def identity(self) -> str:
        """See :meth:`Scorer.identity`: class, address and schema. The server's model is not known before it answers."""
        return f"{type(self).__name__} {self.server.url} {self.schema}"

    @property
    def served_model(self) -> str | None:
        return self._images.model

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """See :meth:`ImageScorer.score`; RemoteError if the server gives no scores."""
        return torch.tensor(self._images.begin(prompts, images)())
