"""Scorer by GenEval (arXiv:2310.11513), which checks with a detector that an image shows the prompt's objects."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentreward.contracts import PathText
from latentreward.errors import InputError, first_line
from latentreward.scorers.tools.base import JudgedPicture, ToolScorer
from latentreward.scorers.tools.running import DAY, commit_of, interpreter, package_versions, place_png, run_tool

NAME = re.compile(r"(\d+)/samples/(\d+)\.png$")
"""Pattern of a file name in GenEval's results: index of the prompt, and number of the image."""


class GenEvalScorer(ToolScorer):
    """GenEval's verdict on each image, 1 for correct and 0 for wrong; the headline is the mean of the six tags' means.

    The scorer runs ``evaluation/evaluate_images.py`` of the released code (github.com/djghosh13/geneval) in a separate
    Python environment (mmdet 2, a CUDA device), or reads a ``results.jsonl`` that this script has written. The prompts
    must be GenEval's ``prompts/evaluation_metadata.jsonl``.

    Args:
        repository: Clone of the released code.
        python: Python interpreter of GenEval's environment.
        model_path: Folder with the detector's weights.
        model_config: Configuration file of the detector; mmdet's own by default.
        results: A ``results.jsonl`` to read instead of running GenEval; ``{policy}`` is replaced by the name of the
            policy. Folder names in the file must be indices of prompts.
        name: Name of the scores in reports.
        timeout_s: Seconds after which a run is killed.

    Raises:
        InputError: If a file is missing, the run fails, or the results are not those of the given images.
    """

    headline = "mean_of_groups"

    def __init__(
        self,
        repository: Path | None = None,
        python: Path | None = None,
        model_path: Path | None = None,
        *,
        model_config: Path | None = None,
        results: PathText | None = None,
        name: str = "geneval",
        timeout_s: float = DAY,
    ) -> None:
        super().__init__(name)
        self.results, self.model_path, self.model_config, self.timeout_s = results, model_path, model_config, timeout_s
        self.repository = repository
        if results is None:
            self.python = interpreter(name, python)
            self.script = _existing(name, "repository", repository) / "evaluation" / "evaluate_images.py"
            _existing(name, "repository", self.script)
            _existing(name, "model_path", model_path)

    def prepare(self) -> None:
        """Check that the packages are installed in the environment, and record versions and commit."""
        if self.repository is not None and self.results is None:
            packages = package_versions(self.name, self.python, ("mmdet", "open-clip-torch"))
            self.versions = f"commit {commit_of(self.repository)} {packages}"

    def check(self, pictures: Sequence[JudgedPicture]) -> None:
        """Check that all prompts have GenEval's fields.

        Raises:
            InputError: If a prompt lacks a field.
        """
        for picture in pictures:
            if not {"tag", "include", "prompt"} <= picture.fields.keys():
                remedy = "set prompts to GenEval's evaluation_metadata.jsonl"
                raise InputError(f"{self.name}: prompt {picture.prompt[:60]!r} has no tag and objects; {remedy}")

    def score_pictures(self, pictures: Sequence[JudgedPicture], policy: str, work: Path) -> np.ndarray:
        """See :meth:`ToolScorer.score_pictures`."""
        if self.results is not None:
            return read_results(self.name, Path(self.results.replace("{policy}", policy)), pictures)
        folder, output = work / "images", work / "results.jsonl"
        lay_out(pictures, folder)
        output.unlink(missing_ok=True)
        command = [self.python, str(self.script.resolve()), str(folder.resolve()), "--outfile", str(output.resolve())]
        command += ["--model-path", str(self.model_path)]
        command += [] if self.model_config is None else ["--model-config", str(self.model_config)]
        run_tool(self.name, command, self.script.parent, work / "log.txt", self.timeout_s)
        return read_results(self.name, output, pictures)


def lay_out(pictures: Sequence[JudgedPicture], folder: Path) -> None:
    """Write images in GenEval's layout, ``00000/metadata.jsonl`` and ``00000/samples/0000.png``; clears ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    for picture in pictures:
        prompt_folder = folder / f"{picture.place:05d}"
        place_png(picture.path, prompt_folder / "samples" / f"{picture.image:04d}.png")
        (prompt_folder / "metadata.jsonl").write_text(json.dumps(picture.fields), encoding="utf-8")


def read_results(name: str, path: Path, pictures: Sequence[JudgedPicture]) -> np.ndarray:
    """Read the verdicts on N images from a ``results.jsonl`` of GenEval: ``(N,)`` float64, 1 for correct, 0 for wrong.

    Raises:
        InputError: If the file cannot be read, has no verdict on an image, or has another prompt for an image.
    """
    if not path.is_file():
        raise InputError(f"{name}: no file {path}; give a results.jsonl of GenEval")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = {}
        for row in rows:
            match = NAME.search(row["filename"].replace("\\", "/"))
            if match is None:
                raise ValueError(f"file name {row['filename']!r}")
            if row["correct"] not in (True, False):  # 1 and 0 are equal to these
                raise ValueError(f"correct: {row['correct']!r}")
            if (key := (int(match[1]), int(match[2]))) in found:
                raise ValueError(f"two rows for {match[0]}")
            found[key] = (str(row["prompt"]), float(row["correct"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{name}: {path} holds no results of GenEval ({first_line(error)}); run it again") from error
    scores = []
    for picture in pictures:
        prompt, correct = found.get((picture.place, picture.image), (None, np.nan))
        if prompt is not None and prompt != picture.fields.get("prompt", picture.prompt):
            other = f"{prompt[:60]!r} in folder {picture.place:05d}, not {picture.prompt[:60]!r}"
            raise InputError(f"{name}: {path} has {other}; give results of the same prompts in the same order")
        if prompt is None:
            raise InputError(f"{name}: {path} has no result for {picture.place:05d}/samples/{picture.image:04d}.png")
        scores.append(correct)
    return np.array(scores, dtype=np.float64)


def _existing(name: str, setting: str, path: Path | None) -> Path:
    if path is None or not path.exists():
        given = "is not given" if path is None else f"{path} does not exist"
        raise InputError(f"{setting} of {name} {given}; give it, or results")
    return path
