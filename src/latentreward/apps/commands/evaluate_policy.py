"""``latentreward evaluate-policy``: score pictures of one or two generators, made from the same prompts and noise."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from latentreward.alignment import Sampling
from latentreward.apps.evaluation.policy import picture_scores, samples
from latentreward.apps.evaluation.policy.statistics import (
    INTRODUCTION,
    PolicyReport,
    compare,
    policy_scores,
    scores_csv,
    sections,
    side_by_side,
)
from latentreward.apps.generation.image_folder import DETERMINISTIC
from latentreward.apps.generation.trained_policy import files_named, plain
from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, tell
from latentreward.core.interrupts import interrupts_told
from latentreward.core.reports.page import HTML, versions, write_report
from latentreward.core.reports.tables import as_text
from latentreward.core.settings.functions import run_function
from latentreward.core.storage.durable import locked, write_file
from latentreward.core.storage.run_folder import RunFolder
from latentreward.core.workers import SharedWork, Task
from latentreward.data.alignment.prompt_files import PromptRow, read_prompt_set
from latentreward.reward import ImageScorer, Scorer
from latentreward.reward.scorers.fingerprints import public_identity, scorer_fingerprints
from latentreward.reward.scorers.tools import ToolScorer
from latentreward.reward.scoring.find import name_of
from latentreward.tinyworld.captions import judged_captions, tuning_captions

SCORES = "scores.csv"
"""File with every score of every picture."""
SLOTS, NAMES = ("policy", "against"), ("policy", "baseline")
"""Names of the folders of the two policies, and default names of the policies in reports."""
TINY_WORLD = {"tinyworld": judged_captions, "tinyworld_tuning": tuning_captions}
"""Values of ``prompts`` → function that gives captions of the tiny world."""
UNKNOWN_NOISE = "Pictures from a folder are paired by prompt and number; whether their noise was equal is unknown."
PRINTED = ("Scores", "Comparison")
"""Titles of the sections that the terminal shows too."""


def evaluate_policy(
    output_dir: Path,
    scorers: list[Scorer],
    policy: samples.JudgedPolicy,
    against: samples.JudgedPolicy | None = None,
    prompts: PathText | None = None,
    *,
    num_prompts: int | None = None,
    images_per_prompt: int | None = None,
    sampling: Sampling = DETERMINISTIC,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    parts: int = 1,
    cards: int = 400,
    device: str = "auto",
    workers: int = 1,
    gpus_per_worker: float | None = None,
) -> None:
    """Sample pictures from one or two policies, score them, and report means, win rates and the pictures themselves.

    Both policies get the same prompts and start from the same noise, so their pictures are compared in pairs. The
    same command resumes a stopped run; existing pictures and scores are kept. The output folder gets ``report.json``,
    ``report.md``, ``report.html`` and ``scores.csv``.

    Args:
        output_dir: Folder for pictures, scores and reports.
        scorers: Scorers of the pictures, e.g. latentreward.reward.PickScorer or
            latentreward.reward.scorers.tools.CommandScorer.
        policy: Policy to evaluate: a generator (pipeline, checkpoint, lora) or a folder of existing images.
        against: Second policy to compare with; none by default.
        prompts: File of prompts: text, JSON, JSON lines, CSV, TSV or parquet with a column ``prompt`` or ``caption``.
            Or a glob pattern of several files; each file without a column of groups becomes a group. Or ``tinyworld``
            for the tiny world's held-out captions, or ``tinyworld_tuning`` for 96 others on which to choose settings.
            By default the prompts listed in a policy's folder ``images``.
        num_prompts: Number of prompts to take from the start; all by default.
        images_per_prompt: Pictures of each prompt; by default as many as a folder of images has, or 1.
        sampling: Steps, noise and size.
        guidance_scale: Guidance scale of policies without their own, as their family's pipeline takes it; by default
            the family's own: 5 for SD and SD3, where 1 switches guidance off.
        seed: Seed of all noise.
        batch_size: Pictures sampled at once; by default as many as fit the device, 64 at most.
        parts: Number of consecutive parts into which each group of prompts is cut; the standard deviation of the parts'
            means is reported. HPSv2's benchmark uses 10.
        cards: Largest number of pictures of each policy in ``report.html``.
        device: Device of the generators: ``cpu``, ``cuda``, ...; ``auto`` takes a GPU if there is one. Scorers have a
            setting of their own.
        workers: Processes that sample, and in which scorers of images work (tools work in the first process): on this
            machine, or on the Ray cluster of RAY_ADDRESS. More than 1 need the extra ``cluster``.
        gpus_per_worker: GPUs of each of several workers, e.g. 0.5; by default 1 if there are any.
    """
    command = partial(evaluate_policy, **locals())
    picture_scores.check_names(scorers)
    sampling.require_images("evaluate-policy")
    policies = _named(policy, against)
    slots = dict(zip(policies, SLOTS, strict=False))
    found = {name: samples.find_pictures(one.images) for name, one in policies.items() if one.images is not None}
    generated = {name: one for name, one in policies.items() if name not in found}
    rows = _prompt_rows(prompts, found)[:num_prompts]
    numbers = (image for pictures in found.values() for _, image in samples.match(pictures, rows))
    count = images_per_prompt or 1 + max(numbers, default=0)
    wanted = [(place, image) for place in range(len(rows)) for image in range(count)]

    @cache
    def prepare() -> None:
        """Load the scorers of images, at the first call only."""
        for scorer in (one for one in scorers if isinstance(one, ImageScorer)):
            scorer.prepare()

    with SharedWork(command, workers, device, gpus_per_worker) as work:
        plan = samples.SamplingPlan(sampling, guidance_scale, seed, batch_size, work.device)
        settings: dict[str, Any] = {
            "prompts": None if prompts is None else name_of(prompts),
            "num_prompts": len(rows),
            "images_per_prompt": count,
            "sampling": plain(sampling),
            "guidance_scale": {name: plan.guidance_of(judged) for name, judged in policies.items()},
            "seed": seed,
            "parts": parts,
        }

        def sample(judged: samples.JudgedPolicy, shown: Sequence[str]) -> Callable[[Any], Any]:
            prepare()  # so that an unfit scorer fails before anything is sampled
            return samples.sampling_task(judged, plan, shown)

        tasks: dict[str, Task] = {
            samples.PICTURES_OF.format(slots[name]): partial(sample, one) for name, one in generated.items()
        }
        for slot in slots.values():
            tasks[picture_scores.SCORES_OF.format(slot)] = partial(picture_scores.scoring_task, scorers, prepare)
        generators = {name: judged.trained.identity() for name, judged in generated.items()}
        files = {}
        if workers > 1:  # the identities of policies and scorers name files, which may differ between machines
            named = {scorer.name: scorer_fingerprints(scorer) for scorer in scorers}
            files = {**named, **files_named([*generators.values()])}
        spec = {
            **settings,
            "policies": {name: of["policy"] for name, of in generators.items()},
            "scorers": {scorer.name: scorer.identity() for scorer in scorers},
            "files": files,
            "batch_size": batch_size,
        }
        work.join(tasks, spec)
        with locked(output_dir, "output_dir"):
            remedy = "choose an empty folder"
            RunFolder(output_dir, output_dir / "evaluate.json", settings, "output_dir", remedy).claim(made=False)
            for scorer in (one for one in scorers if isinstance(one, ToolScorer)):
                scorer.prepare()
            made = {
                name: samples.import_pictures(one.images, found[name], rows, wanted)
                for name, one in policies.items()
                if one.images is not None
            }
            sampled = {
                name: samples.open_pictures(one, plan, rows, wanted, output_dir / "pictures" / slots[name], work)
                for name, one in generated.items()
            }
            notes = [
                f"{name} has {more} more pictures, of other prompts or numbers; they are ignored."
                for name, pictures in made.items()
                if (more := len(found[name]) - len(pictures))
            ]
            notes += [UNKNOWN_NOISE] if len(policies) > 1 and made else []
            for note in notes:
                tell(note)
            with interrupts_told(lambda: f"what is done is kept in {output_dir}: the same command goes on there"):
                made |= {name: make() for name, make in sampled.items()}
                scorings = [
                    picture_scores.PictureScoring(
                        name, [*made[name].values()], scorers, output_dir / "scores" / slot, work
                    )
                    for name, slot in slots.items()
                ]
                scored = [one.score() for one in scorings]
                picture_scores.require_one_model(scorings)
            headlines = {name: getattr(scorer, "headline", "mean") for scorer in scorers for name in scorer.columns}
            report = PolicyReport(
                {name: judged.describe() for name, judged in policies.items()},
                {scorer.name: public_identity(scorer) for scorer in scorers},
                [score for one in scored for score in policy_scores(one, headlines, parts)],
                compare(scored[0], scored[1], headlines) if len(scored) > 1 else [],
                {**settings, "versions": versions()},
                notes,
            )
            write_file(output_dir / SCORES, scores_csv(scored))
            shown, page = sections(report), side_by_side(scored, cards)
            write_report(output_dir, report, " against ".join(policies), INTRODUCTION, shown, "policy", **page)
            print("\n\n".join(as_text(one.tables[0]) for one in shown if one.title in PRINTED))
            print(f"{output_dir / HTML}: {len(wanted)} pictures of each policy")


def _named(policy: samples.JudgedPolicy, against: samples.JudgedPolicy | None) -> dict[str, samples.JudgedPolicy]:
    given = [policy] if against is None else [policy, against]
    policies = {one.name or name: one for one, name in zip(given, NAMES, strict=False)}
    if len(policies) < len(given):
        raise InputError(f"both policies are called {next(iter(policies))!r}; give each a name of its own")
    return policies


def _prompt_rows(prompts: str | None, found: Mapping[str, Sequence[PromptRow]]) -> list[PromptRow]:
    if prompts in TINY_WORLD:
        return [PromptRow(text) for text in TINY_WORLD[prompts]()]
    if prompts is not None:
        return read_prompt_set(prompts)
    for pictures in found.values():
        return [PromptRow(prompt) for prompt in dict.fromkeys(row.prompt for row in pictures)]
    raise InputError("there are no prompts; set prompts to a file of them")


run = partial(run_function, evaluate_policy)
