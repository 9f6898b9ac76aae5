"""Print the package's files that a training step runs through, in the order of the first call.

``python -m tools.step_files [dina] [lpo] [grpo]`` traces the second of two steps on the tiny world: results are checked
in the first. ``promises.py``, which wraps methods for these checks, is left out.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import Trainer

import latentreward
from latentreward import modules
from latentreward.backbones import create_backbone
from latentreward.policies import PolicySource
from latentreward.rewards import RandomReward
from latentreward.rollout import QuantileThreshold, Sampling
from latentreward.tinyworld import TinyWorldDataModule, TinyWorldPromptDataModule

PACKAGE = Path(latentreward.__file__).parent


def traced(function: Callable[..., Any], files: list[str], *args: Any) -> Any:
    """Call a function, and set ``files`` to those that it runs through."""
    files.clear()

    def note(frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE) and path.name not in ("promises.py", "__init__.py"):
            files.extend({str(path.relative_to(PACKAGE))} - {*files})

    sys.setprofile(note)
    try:
        return function(*args)
    finally:
        sys.setprofile(None)


if __name__ == "__main__":
    options: dict[str, Any] = {"policy": PolicySource(), "reward": RandomReward("readout"), "guidance_scale": 1.0}
    methods: dict[str, Callable[[], Any]] = {
        "dina": lambda: modules.DiNaLRMModule(create_backbone("sd35_tiny")),
        "lpo": lambda: modules.LPOModule(**options, sampling=Sampling(4), selection=QuantileThreshold(0.0)),
        "grpo": lambda: modules.TrajectoryGRPOModule(**options, sampling=Sampling(4), num_trajectories=4),
    }
    for name in sys.argv[1:] or methods:
        module, files = methods[name](), {"training_step": list[str](), "roll_out": list[str]()}
        for method in [method for method in files if hasattr(module, method)]:
            setattr(module, method, partial(traced, getattr(module, method), files[method]))
        with TemporaryDirectory() as folder:
            pairs = TinyWorldDataModule(folder, train_pairs=8, val_pairs=4, batch_size=4, num_workers=0)
            prompts = TinyWorldPromptDataModule(captions=8, batch_size=4, prompts_per_rollout=2)
            trainer = Trainer(max_steps=2, limit_val_batches=0, logger=False, enable_checkpointing=False)
            trainer.fit(module, pairs if name == "dina" else prompts)
        for method, found in files.items():
            print(f"{name}, {method}: {len(found)} files", *found, sep="\n  ")
