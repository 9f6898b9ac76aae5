"""Make an installed torch visible in a new virtual environment, so that pip does not download it again."""

import sys
from importlib.util import find_spec
from pathlib import Path

spec = find_spec("torch")
if spec and spec.origin:
    packages = Path(spec.origin).parents[1]
    (inside,) = Path(sys.argv[1]).glob("lib/python*/site-packages")
    (inside / "outer_packages.pth").write_text(f"{packages}\n")
    print(f"torch of {packages} is used")
