"""Earlier import paths, which saved configs and users' own code still name."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "latentreward.checkpoint_files": "latentreward.checkpoints.files",
    "latentreward.data.prompts": "latentreward.data.alignment.prompts",
    "latentreward.data.prompts_and_images": "latentreward.data.alignment.prompts_and_images",
    "latentreward.inference": "latentreward.generation",
    "latentreward.heads.logistic": "latentreward.heads.gated_qformer",
    "latentreward.pages": "latentreward.reports",
    "latentreward.scoring.stored": "latentreward.scoring.layouts.find",
    "latentreward.strategies": "latentreward.checkpoints.fsdp2",
}
"""Module or package of an earlier release → the one that took its place."""


class MovedModules(MetaPathFinder, Loader):
    """Import the module that took an earlier one's place, as the same object under both names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Recognise an earlier module, or one inside an earlier package."""
        return ModuleSpec(fullname, self) if today(fullname) != fullname else None

    def exec_module(self, module: ModuleType) -> None:
        """Put today's module in the place of the empty one that the import system made."""
        sys.modules[module.__name__] = import_module(today(module.__name__))


def today(name: str) -> str:
    """Translate a module's earlier name; other names come back unchanged."""
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        if new := MOVED.get(".".join(parts[:length])):
            return ".".join([new, *parts[length:]])
    return name


# First: an earlier package is today's, whose folder holds its modules under their present names, and a second copy of
# one of them would have classes of its own.
sys.meta_path.insert(0, MovedModules())
