"""Names of edits, by which prompts with and without the bytes of their pictures are compared."""

from collections.abc import Iterable

from latentreward.core.contracts import sources_of


def named(prompts: Iterable[str]) -> list[tuple[str, ...]]:
    """Return texts, and keys of the pictures."""
    return [(str(prompt), *(source.image_key for source in sources_of(prompt))) for prompt in prompts]
