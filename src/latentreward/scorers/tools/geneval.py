"""GenEval (arXiv:2310.11513): whether the objects that a prompt asks for are there, by a detector."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentreward.errors import InputError, first_line
from latentreward.scorers.tools.base import JudgedPicture, ToolScorer
from latentreward.scorers.tools.running import DAY, commit_of, interpreter, package_versions, place_png, run_tool

PACKAGES = ("mmdet", "open-clip-torch")
NAME = re.compile(r"(\d+)/samples/(\d+)\.png$")
"""Prompt and picture in a file name of the results."""


class GenEvalScorer(ToolScorer):
    """1 where GenEval finds a picture correct, 0 where not; GenEval's score is the mean of the six tags' means.

    It runs ``evaluation/evaluate_images.py`` of the released code (github.com/djghosh13/geneval) in an environment of
    its own (mmdet 2, a CUDA device), on pictures laid out as it wants them; or reads a ``results.jsonl`` from there.
    Prompts must be its ``prompts/evaluation_metadata.jsonl``.

    Args:
        repository: Clone of the released code.
        python: The Python of its environment.
        model_path: Folder with the detector's weights.
        model_config: The detector's configuration; mmdet's own by default.
        results: A ``results.jsonl``, instead of a run; ``{policy}`` stands for the name of the policy. Folder names in
            it are places of prompts.
        name: Name of the scores.
        timeout_s: Seconds after which a run is killed.

    Raises:
        InputError: If something is missing, the run fails, or the results are not of these pictures.
    """

    headline = "mean_of_groups"

    def __init__(
        self,
        repository: Path | None = None,
        python: Path | None = None,
        model_path: Path | None = None,
        *,
        model_config: Path | None = None,
        results: str | None = None,
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
        """Ask the environment for its versions."""
        if self.repository is not None and self.results is None:
            packages = package_versions(self.name, self.python, PACKAGES)
            self.versions = f"commit {commit_of(self.repository)} {packages}"

    def check(self, pictures: Sequence[JudgedPicture]) -> None:
        """Refuse prompts without GenEval's fields."""
        for picture in pictures:
            if not {"tag", "include", "prompt"} <= picture.fields.keys():
                raise InputError(
                    f"{self.name}: prompt {picture.prompt[:60]!r} has no tag and objects to look for; set prompts to "
                    "GenEval's evaluation_metadata.jsonl"
                )

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
    """``00000/metadata.jsonl`` and ``00000/samples/0000.png`` for each prompt and picture, and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for picture in pictures:
        place = folder / f"{picture.place:05d}"
        place_png(picture.path, place / "samples" / f"{picture.image:04d}.png")
        (place / "metadata.jsonl").write_text(json.dumps(picture.fields), encoding="utf-8")


def read_results(name: str, path: Path, pictures: Sequence[JudgedPicture]) -> np.ndarray:
    """``(N,)`` float64, 1 for correct, of N pictures in a ``results.jsonl``.

    Raises:
        InputError: If it is no such file, or lacks or confuses a picture.
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
            found[int(match[1]), int(match[2])] = (str(row["prompt"]), float(bool(row["correct"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{name}: {path} holds no results of GenEval ({first_line(error)}); run it again") from error
    scores = []
    for picture in pictures:
        prompt, correct = found.get((picture.place, picture.image), (None, np.nan))
        if prompt is not None and prompt != picture.fields.get("prompt", picture.prompt):
            raise InputError(
                f"{name}: {path} has {prompt[:60]!r} in folder {picture.place:05d}, not {picture.prompt[:60]!r}; "
                "give results of the same prompts in the same order"
            )
        if prompt is None:
            raise InputError(f"{name}: {path} has no result for {picture.place:05d}/samples/{picture.image:04d}.png")
        scores.append(correct)
    return np.array(scores, dtype=np.float64)


def _existing(name: str, setting: str, path: Path | None) -> Path:
    if path is None or not path.exists():
        given = "is not given" if path is None else f"{path} does not exist"
        raise InputError(f"{setting} of {name} {given}; give it, or results")
    return path
