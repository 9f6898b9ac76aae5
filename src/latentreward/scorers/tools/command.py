"""Any program that reads a table of pictures and writes one of scores; ImageReward and HPSv3 among them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentreward.errors import InputError
from latentreward.programs import check_program
from latentreward.scorers.tools.base import JudgedPicture, ToolScorer
from latentreward.scorers.tools.running import DAY, interpreter, package_versions, run_tool
from latentreward.scorers.tools.score_file import look_up, write_pictures_table

DRIVERS = Path(__file__).parent / "drivers"


class CommandScorer(ToolScorer):
    """Runs a program once for all pictures of a policy.

    Args:
        command: Program and arguments, in which ``{pictures}`` stands for a file of JSON lines with ``file``, ``path``
            and ``prompt`` of each picture, and ``{scores}`` for the file that it is to write: JSON lines with ``file``
            and ``score``.
        name: Name of the scores.
        folder: Where it runs; a folder of its own by default.
        timeout_s: Seconds after which it is killed.

    Raises:
        InputError: If the program is not there, fails, takes too long, or leaves a picture out.
    """

    def __init__(
        self, command: Sequence[str], name: str, *, folder: Path | None = None, timeout_s: float = DAY
    ) -> None:
        super().__init__(name)
        if not command or not any("{scores}" in part for part in command):
            raise InputError(f"command of {name} must hold {{scores}}, the file that it writes; add it")
        if not timeout_s > 0:
            raise InputError(f"timeout_s={timeout_s:g} of {name} must be above 0")
        check_program(command[0])
        self.command, self.folder, self.timeout_s = list(command), folder, timeout_s

    def identity(self) -> str:
        """Class and command."""
        return f"{type(self).__name__} {' '.join(self.command)}"

    def prepare(self) -> None:
        """Look for the program."""
        if shutil.which(self.command[0]) is None:
            raise InputError(f"command of {self.name}: {self.command[0]} is no program; give its whole path")

    def score_pictures(self, pictures: Sequence[JudgedPicture], policy: str, work: Path) -> np.ndarray:
        """See :meth:`ToolScorer.score_pictures`."""
        table, scores = work / "pictures.jsonl", work / "scores.jsonl"
        write_pictures_table(table, pictures)
        scores.unlink(missing_ok=True)
        read, written = str(table.resolve()), str(scores.resolve())
        command = [part.replace("{pictures}", read).replace("{scores}", written) for part in self.command]
        run_tool(self.name, command, self.folder or work, work / "log.txt", self.timeout_s)
        return look_up(self.name, scores, "score", pictures)


class _PackageScorer(CommandScorer):
    """A package of another environment, called by a script of ours there."""

    packages: tuple[str, ...]
    driver: str

    def __init__(self, python: Path | None, name: str, timeout_s: float) -> None:
        self.python = interpreter(name, python)
        command = [self.python, str(DRIVERS / self.driver), "{pictures}", "{scores}"]
        super().__init__(command, name, timeout_s=timeout_s)

    identity = ToolScorer.identity

    def prepare(self) -> None:
        """Ask the environment for its versions."""
        self.versions = package_versions(self.name, self.python, self.packages)


class ImageRewardScorer(_PackageScorer):
    """ImageReward (arXiv:2304.05977), run by its package ``image-reward`` in an environment of its own.

    It needs torchvision, timm 0.6.13 and fairscale, which do not go beside transformers 5.

    Args:
        python: The Python of that environment.
        name: Name of the scores.
        timeout_s: Seconds after which it is killed.

    Raises:
        InputError: If there is no such program, or the package is not installed there.
    """

    packages, driver = ("image-reward",), "score_with_image_reward.py"

    def __init__(self, python: Path | None = None, *, name: str = "imagereward", timeout_s: float = DAY) -> None:
        super().__init__(python, name, timeout_s)


class HPSv3Scorer(_PackageScorer):
    """HPSv3 (arXiv:2508.03789): the mean μ of its score, run by its package ``hpsv3`` in an environment of its own.

    The order of its arguments changed after 1.0.0; they are given by name.

    Args:
        python: The Python of that environment (transformers 4.45.2, torchvision).
        name: Name of the scores.
        timeout_s: Seconds after which it is killed.

    Raises:
        InputError: If there is no such program, or the package is not installed there.
    """

    packages, driver = ("hpsv3",), "score_with_hpsv3.py"

    def __init__(self, python: Path | None = None, *, name: str = "hpsv3", timeout_s: float = DAY) -> None:
        super().__init__(python, name, timeout_s)
