"""BLAKE2b digest of texts and buffers."""

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any


def digest(parts: Iterable[Any], size: int = 16) -> str:
    """Compute the BLAKE2b digest of the concatenated ``parts``, as ``2 * size`` hexadecimal digits.

    Args:
        parts: Texts, encoded as UTF-8 with question marks for lone surrogates; or buffers, such as bytes and arrays.
        size: Bytes of the digest.
    """
    state = blake2b(digest_size=size)
    for part in parts:
        state.update(part.encode("utf-8", "replace") if isinstance(part, str) else part)
    return state.hexdigest()
