"""Scorer by T2I-CompBench++ (arXiv:2307.06350), which checks attributes, relations and numbers named in a prompt."""

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentreward.contracts import PathText
from latentreward.errors import InputError, first_line
from latentreward.scorers.tools.base import JudgedPicture, ToolScorer
from latentreward.scorers.tools.running import DAY, commit_of, interpreter, place_png, run_tool

BLIP = ("BLIPvqa_eval", "BLIP_vqa.py", "--out_dir", ("annotation_blip",))
OBJECTS = "annotation_obj_detection"
SPATIAL = ("UniDet_eval", "2D_spatial_eval.py", "--outpath", (f"labels/{OBJECTS}_2d", f"{OBJECTS}_2d", OBJECTS))
DEPTH = ("UniDet_eval", "3D_spatial_eval.py", "--outpath", (f"labels/{OBJECTS}_3d", f"{OBJECTS}_3d"))
NUMBER = ("UniDet_eval", "numeracy_eval.py", "--outpath", ("annotation_num",))
CLIP = ("CLIPScore_eval", "CLIP_similarity.py", "--outpath", ("annotation_clip",))
"""Programs of the benchmark: folder, script, option for the folder of images, result folders of several releases."""
CATEGORIES = {
    "color": (BLIP,),
    "shape": (BLIP,),
    "texture": (BLIP,),
    "spatial": (SPATIAL,),
    "3d_spatial": (DEPTH,),
    "numeracy": (NUMBER,),
    "non_spatial": (CLIP,),
    "complex": (BLIP, SPATIAL, CLIP),
}
"""Category of prompts → programs that score it."""


class T2ICompBenchScorer(ToolScorer):
    """T2I-CompBench++'s score of each image, in [0, 1]; the headline is the mean of the categories' means.

    The scorer runs the released code (github.com/Karine-Huang/T2I-CompBench) in a separate Python environment, category
    by category, or reads results that the code has written. The prompts must be the benchmark's
    ``examples/dataset/*_val.txt``; the file names are the categories. The published protocol uses ten images per
    prompt.

    Args:
        repository: Clone of the released code; needed with ``results`` too if there are prompts of the category
            ``complex``, to read which relations they have.
        python: Python interpreter of the benchmark's environment.
        results: Folder of existing results to read instead of running the programs, with a folder per category as the
            programs write it; ``{policy}`` is replaced by the name of the policy. Images must be numbered prompt by
            prompt, in the order of the file of prompts.
        name: Name of the scores in reports.
        timeout_s: Seconds after which a program is killed.

    Raises:
        InputError: If a file is missing, a program fails, or the number of results is not that of the images.

    Note:
        The score of a complex prompt is the mean over the programs that apply to it: attributes and positions,
        attributes and actions, or all three. The released ``3_in_1.py`` does the same, but only for ten images per
        prompt.
    """

    headline = "mean_of_groups"

    def __init__(
        self,
        repository: Path | None = None,
        python: Path | None = None,
        *,
        results: PathText | None = None,
        name: str = "t2i_compbench",
        timeout_s: float = DAY,
    ) -> None:
        super().__init__(name)
        self.repository, self.results, self.timeout_s = repository, results, timeout_s
        if results is None:
            self.python = interpreter(name, python)
            if repository is None or not (repository / BLIP[0] / BLIP[1]).is_file():
                raise InputError(f"repository of {name}: {repository} holds no {BLIP[0]}; give a clone, or results")

    def prepare(self) -> None:
        """Record the commit of the clone."""
        if self.repository is not None:
            self.versions = f"commit {commit_of(self.repository)}"

    def check(self, pictures: Sequence[JudgedPicture]) -> None:
        """Check that each prompt has a category and can be part of a file name.

        Raises:
            InputError: If a prompt does not, or the lists of complex prompts are missing.
        """
        for picture in pictures:
            if picture.group not in CATEGORIES:
                known = f"{', '.join(CATEGORIES)}; set prompts to T2I-CompBench's examples/dataset/*_val.txt"
                raise InputError(f"{self.name}: group {picture.group!r} is none of {known}")
            if {"/", "_", "\0"} & set(picture.prompt) or len(_file_name(picture.prompt, 0).encode()) > 255:
                remedy = "in which the programs look for the prompt; use its own prompts"
                raise InputError(f"{self.name}: {picture.prompt[:60]!r} makes no file name, {remedy}")
        if any(picture.group == "complex" for picture in pictures):
            self._concerns("spatial"), self._concerns("action")

    def score_pictures(self, pictures: Sequence[JudgedPicture], policy: str, work: Path) -> np.ndarray:
        """See :meth:`ToolScorer.score_pictures`."""
        scores = np.full(len(pictures), np.nan)
        rows = defaultdict(list)
        for row, picture in enumerate(pictures):
            rows[picture.group].append(row)
        for category, chosen in rows.items():
            own = [pictures[row] for row in chosen]
            folder = work / category
            if self.results is None:
                self._run(category, own, folder)
            else:
                folder = Path(self.results.replace("{policy}", policy)) / category
            scores[chosen] = self._read(category, own, folder)
        return scores

    def _run(self, category: str, pictures: Sequence[JudgedPicture], folder: Path) -> None:
        assert self.repository is not None
        shutil.rmtree(folder, ignore_errors=True)
        for number, picture in enumerate(pictures):
            place_png(picture.path, folder / "samples" / _file_name(picture.prompt, number))
        for program, script, option, _ in CATEGORIES[category]:
            command = [self.python, script, option, str(folder.resolve())]
            command += ["--complex", "True"] if category == "complex" and program != BLIP[0] else []
            log = folder / f"{Path(script).stem}.log"
            run_tool(f"{self.name} ({category})", command, self.repository / program, log, self.timeout_s)

    def _read(self, category: str, pictures: Sequence[JudgedPicture], folder: Path) -> np.ndarray:
        parts = [_answers(self.name, tool, folder, len(pictures)) for tool in CATEGORIES[category]]
        if category != "complex":
            return parts[0]
        spatial, action = self._concerns("spatial"), self._concerns("action")
        kinds = [_line(picture.prompt) for picture in pictures]
        attribute, position, act = np.stack(parts)
        both = np.where([kind in spatial for kind in kinds], position, act)
        either = np.array([kind in spatial or kind in action for kind in kinds])
        return np.where(either, (attribute + both) / 2, (attribute + position + act) / 3)

    def _concerns(self, kind: str) -> set[str]:
        """Read the set of complex prompts about ``kind``, which is ``spatial`` or ``action``."""
        path = (self.repository or Path()) / "examples" / "dataset" / f"complex_val_{kind}.txt"
        if self.repository is None or not path.is_file():
            raise InputError(f"{self.name}: no {path} for complex prompts; set repository to a clone of T2I-CompBench")
        return set(map(_line, path.read_text(encoding="utf-8").splitlines()))


def _answers(name: str, tool: tuple[str, str, str, tuple[str, ...]], folder: Path, number: int) -> np.ndarray:
    """Read the ``number`` scores that one program wrote, in the order of the images."""
    files = [folder / subfolder / "vqa_result.json" for subfolder in tool[3]]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise InputError(f"{name}: no {files[0]}, which {tool[1]} writes; run it, or name the folder it left")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        answers = {int(row["question_id"]): float(row["answer"]) for row in rows}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{name}: {path} holds no answers ({first_line(error)}); run {tool[1]} again") from error
    if len(rows) != number or sorted(answers) != list(range(number)) or not np.isfinite(list(answers.values())).all():
        raise InputError(f"{name}: {path} has {len(rows)} answers for {number} pictures; run {tool[1]} on all of them")
    return np.array([answers[index] for index in range(number)])


def _file_name(prompt: str, number: int) -> str:
    return f"{prompt}_{number:06d}.png"


def _line(prompt: str) -> str:
    """Shorten a complex prompt to the form in which the released code compares prompts."""
    return prompt.strip("\n").split(".")[0].lower()
