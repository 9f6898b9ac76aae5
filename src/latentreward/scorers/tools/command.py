"""Scorers that run a program which reads a table of images and writes a table of scores, such as ImageReward."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentreward.errors import InputError, check_range
from latentreward.programs import check_program
from latentreward.scorers.tools.base import JudgedPicture, ToolScorer
from latentreward.scorers.tools.running import DAY, interpreter, package_versions, run_tool
from latentreward.scorers.tools.score_file import look_up

DRIVERS = Path(__file__).parent / "drivers"  # folder of the scripts that run in environments of other packages


class CommandScorer(ToolScorer):
    """A scorer that runs any program, once for all images of a policy.

    Args:
        command: Program (a relative path is one in ``folder``) and arguments. ``{pictures}`` is replaced by the path of
            the input, a file of JSON lines with ``file``, ``path`` and ``prompt`` of each image. ``{scores}`` is
            replaced by the path of the output that the program must write, a file of JSON lines with ``file`` and
            ``score`` of each image.
        name: Name of the scores in reports.
        folder: Working directory of the program; by default the folder with the program's input, output and log.
        timeout_s: Seconds after which the program is killed.

    Raises:
        InputError: If the program does not exist, fails, takes too long, or writes no score for an image.
    """

    def __init__(
        self, command: Sequence[str], name: str, *, folder: Path | None = None, timeout_s: float = DAY
    ) -> None:
        super().__init__(name)
        if not command or not any("{scores}" in part for part in command):
            raise InputError(f"command of {name} must hold {{scores}}, the file that it writes; add it")
        check_range("(0, inf]", timeout_s=timeout_s)
        check_program(command[0])
        self.command, self.folder, self.timeout_s = list(command), folder, timeout_s

    def identity(self) -> str:
        """See :meth:`Scorer.identity`: class and command."""
        return f"{type(self).__name__} {' '.join(self.command)}"

    def prepare(self) -> None:
        """Check that the program exists; raise InputError if it does not."""
        program: str | Path = self.command[0]
        if "/" in self.command[0]:  # the system looks it up in the working directory, which without `folder` has none
            program = (self.folder or Path(os.devnull)).absolute() / program
        if shutil.which(program) is None:
            raise InputError(f"command of {self.name}: {self.command[0]} is no program; give its whole path")

    def score_pictures(self, pictures: Sequence[JudgedPicture], policy: str, work: Path) -> np.ndarray:
        """See :meth:`ToolScorer.score_pictures`."""
        table, scores = work / "pictures.jsonl", work / "scores.jsonl"
        rows = ({"file": item.file, "path": str(item.path.resolve()), "prompt": item.prompt} for item in pictures)
        table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        scores.unlink(missing_ok=True)
        read, written = str(table.resolve()), str(scores.resolve())
        command = [part.replace("{pictures}", read).replace("{scores}", written) for part in self.command]
        run_tool(self.name, command, self.folder or work, work / "log.txt", self.timeout_s)
        return look_up(self.name, scores, "score", pictures)


class _PackageScorer(CommandScorer):
    """Base class of scorers by Python packages in another environment, called there by a script of :data:`DRIVERS`."""

    packages: tuple[str, ...]
    driver: str

    def __init__(self, python: Path | None, name: str, timeout_s: float) -> None:
        self.python = interpreter(name, python)
        command = [self.python, str(DRIVERS / self.driver), "{pictures}", "{scores}"]
        super().__init__(command, name, timeout_s=timeout_s)

    identity = ToolScorer.identity

    def prepare(self) -> None:
        """Check that ``packages`` are installed for the interpreter ``python``, and record their versions."""
        self.versions = package_versions(self.name, self.python, self.packages)


class ImageRewardScorer(_PackageScorer):
    """ImageReward (arXiv:2304.05977), run by the package ``image-reward`` in a separate Python environment.

    The package needs torchvision, timm 0.6.13 and fairscale, which cannot be installed beside transformers 5.

    Args:
        python: Python interpreter of that environment.
        name: Name of the scores in reports.
        timeout_s: Seconds after which the run is killed.

    Raises:
        InputError: If the interpreter does not exist, or the package is not installed in its environment.
    """

    packages, driver = ("image-reward",), "score_with_image_reward.py"

    def __init__(self, python: Path | None = None, *, name: str = "imagereward", timeout_s: float = DAY) -> None:
        super().__init__(python, name, timeout_s)


class HPSv3Scorer(_PackageScorer):
    """HPSv3 (arXiv:2508.03789), run by the package ``hpsv3`` in a separate Python environment.

    HPSv3 predicts a normal distribution of the score; its mean μ is used.

    Args:
        python: Python interpreter of that environment (transformers 4.45.2, torchvision).
        name: Name of the scores in reports.
        timeout_s: Seconds after which the run is killed.

    Raises:
        InputError: If the interpreter does not exist, or the package is not installed in its environment.
    """

    packages, driver = ("hpsv3",), "score_with_hpsv3.py"

    def __init__(self, python: Path | None = None, *, name: str = "hpsv3", timeout_s: float = DAY) -> None:
        super().__init__(python, name, timeout_s)
