"""Syntax trees of the package's files."""

import ast
import gc
from functools import cache
from pathlib import Path


@cache
def parsed(path: Path) -> ast.Module:
    """Parse a file without collecting garbage meanwhile.

    Before Python 3.11.8 and 3.12.2, finalizers that a collection runs, or threads that run between them, may parse too,
    and then `ast.parse` raises "AST constructor recursion depth mismatch" (python/cpython#106905).
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        if collecting:
            gc.enable()
