"""Policies under evaluation, and their pictures: sampled from a generator, or made elsewhere and read from a folder."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch

from latentreward.alignment import PolicySource, Sampling, sample_latents
from latentreward.alignment.policies.checkpoint import read_policy_adapter
from latentreward.apps.generation.image_folder import (
    ImageFolder,
    Made,
    Name,
    decode_latents,
    draw_batch,
    fitting_batch,
    make_pictures,
)
from latentreward.apps.generation.search import Chosen
from latentreward.apps.generation.trained_policy import TrainedPolicy, offload_text_encoders, plain
from latentreward.core.contracts import PathText, PromptBatch, sources_of
from latentreward.core.errors import InputError
from latentreward.core.storage.digests import digest
from latentreward.core.workers import SharedWork
from latentreward.data import ImageError, count_text, decode_image
from latentreward.data.alignment.prompt_files import PromptRow, read_prompt_rows
from latentreward.data.images import file_image, image_bytes
from latentreward.reward.scorers.tools import JudgedPicture
from latentreward.reward.scoring.find import name_of

TABLES = ("images.csv", "images.jsonl")


def find_pictures(folder: Path) -> list[PromptRow]:
    """Read the table of a folder of pictures, ``images.csv`` or ``images.jsonl``.

    Its columns are ``file`` and ``prompt``, optionally ``place`` and ``image`` (numbers from 0), and of edits
    ``source_images`` with paths in the folder, as ``latentreward generate`` writes them.
    """
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is None:
        raise InputError(f"images: there is no {folder / TABLES[0]}; write it, with columns file and prompt")
    rows = read_prompt_rows(str(table), "images")
    for row in rows:
        if not isinstance(file := row.fields.get("file"), str) or not file:
            raise InputError(f"images: {table}: prompt {row.prompt[:60]!r} has no file; write a column of paths")
        for name in ("place", "image"):
            if not re.fullmatch(r"\s*(\d{1,15}(\.0)?)?\s*", str(_told(row, name))):
                problem = f"{name} {row.fields[name]!r} of {file} is not a whole number"
                raise InputError(f"images: {table}: {problem}; write numbers from 0")
    return rows


def match(found: Sequence[PromptRow], rows: Sequence[PromptRow]) -> dict[Name, str]:
    """Match pictures with a set of prompts: (index of the prompt, number of the picture of that prompt) → file.

    Pictures are matched by the text of their prompt, and edits also by the bytes of the pictures that were edited. If a
    prompt occurs k times in the set, its pictures are cut into k runs of equal length, the first for the first
    occurrence.
    """

    @cache
    def key_of(prompt: str) -> tuple[str, ...]:
        return (str(prompt), *(digest([image_bytes(image)]) for image in sources_of(prompt)))

    pictures, places = defaultdict(list), defaultdict(list)
    for row in found:
        pictures[key_of(row.prompt)].append(row)
    for place, row in enumerate(rows):
        places[key_of(row.prompt)].append(place)
    matched: dict[Name, str] = {}
    for key in pictures.keys() & places.keys():
        own = sorted(pictures[key], key=lambda row: [float(_told(row, name) or 0) for name in ("place", "image")])
        size = -(-len(own) // len(places[key]))
        for start, place in zip(range(0, len(own), size), places[key], strict=False):
            run = own[start : start + size]
            told = [_told(row, "image") for row in run]
            known = "" not in told and len(set(told)) == len(run)
            numbers = map(int, map(float, told)) if known else range(len(run))
            matched |= {(place, number): row.fields["file"] for number, row in zip(numbers, run, strict=True)}
    return matched


def import_pictures(
    folder: Path, found: Sequence[PromptRow], rows: Sequence[PromptRow], wanted: Sequence[Name]
) -> dict[Name, JudgedPicture]:
    """Return the ``wanted`` pictures of a folder, each decoded once, or raise InputError that says what is missing."""
    matched, pictures, problems = match(found, rows), dict[Name, JudgedPicture](), Counter[str]()
    for place, image in wanted:
        if (file := matched.get((place, image))) is None:
            continue
        try:
            decode_image(reference := file_image(folder, file))
        except ImageError as error:
            problems[error.problem] += 1
            continue
        pictures[place, image] = judged(place, image, file, reference.path or folder, rows[place])
    if lacking := [name for name in wanted if name not in pictures]:
        because = f" ({count_text(problems)})" if problems else ""
        lacks = (
            f"lacks {len(lacking)} of {len(wanted)} pictures, first number {lacking[0][1]} of prompt {lacking[0][0]}"
        )
        raise InputError(f"images: {folder} {lacks}{because}; add them, or set images_per_prompt or num_prompts")
    return pictures


def judged(place: int, image: int, file: str, path: Path, row: PromptRow) -> JudgedPicture:
    """Return a picture of the prompt of a row, with the row's group and further columns."""
    return JudgedPicture(place, image, file, path, row.prompt, row.group, dict(row.fields))


def _told(row: PromptRow, name: str) -> str:
    """Return the text of a number in the table; empty if there is none."""
    value = row.fields.get(name)
    return "" if value is None else str(value).strip()


NAME = re.compile(r"[\w .,+=-]{1,60}")
PICTURES_OF = "pictures of {}"
"""Format of the name of the task that samples the pictures of a policy, from the name of the policy's folders."""


@dataclass
class JudgedPolicy:
    """Policy under evaluation: a generator, or a folder of existing pictures.

    Attributes:
        name: Name in reports; by default ``policy``, or ``baseline`` for the policy given as ``against``.
        pipeline: Diffusers pipeline folder, hub id, ``sd_tiny`` or ``sd35_tiny``; or all settings of a
            ``PolicySource``. By default the pipeline recorded in the checkpoint.
        checkpoint: Checkpoint of an alignment run, whose adapter is loaded.
        lora: LoRA file or folder to load, as ``latentreward export`` writes it.
        guidance_scale: Guidance scale of this policy; by default that of the run.
        images: Folder of existing pictures, instead of a generator, with ``images.csv`` or ``images.jsonl`` (``file``
            and ``prompt``) as ``latentreward generate`` writes it.
    """

    name: str | None = None
    pipeline: PolicySource | PathText | None = None
    checkpoint: Path | None = None
    lora: Path | None = None
    guidance_scale: float | None = None
    images: Path | None = None

    def __post_init__(self) -> None:
        """Raise InputError for a bad name, and unless exactly one of a generator and a folder of pictures is given."""
        if self.name is not None and not NAME.fullmatch(self.name):
            raise InputError(f"name of a policy is {self.name!r}; use up to 60 letters, digits, spaces and . , + = - _")
        made = [name for name in ("pipeline", "checkpoint", "lora") if getattr(self, name) is not None]
        if self.images is not None and made:
            raise InputError(
                f"images and {made[0]} are both given, one perhaps by a config file; to judge the images, say "
                f"--policy.{made[0]} null, and --against.{made[0]} null for the images of against"
            )
        if self.images is None and self.pipeline is None and self.checkpoint is None:
            raise InputError("there is nothing to judge; set pipeline, checkpoint or images of the policy")

    @cached_property
    def trained(self) -> TrainedPolicy:
        """Settings of the generator, whose weights are not loaded yet."""
        source = self.pipeline
        if isinstance(source, str):
            source = PolicySource(source)
            if self.checkpoint is not None:  # the checkpoint records the shape of its adapter
                source = replace(source, lora=read_policy_adapter(self.checkpoint).source.lora)
        return TrainedPolicy(source, self.checkpoint, self.lora)

    def describe(self) -> str:
        """Describe the policy in one line, with names of files and folders instead of full paths."""
        if self.images is not None:
            return f"pictures of {name_of(str(self.images))}"
        parts = [name_of(str(self.trained.source().source))]
        parts += [f"checkpoint {name_of(str(self.checkpoint))}"] if self.checkpoint else []
        parts += [f"LoRA {name_of(str(self.lora))}"] if self.lora else []
        return ", ".join(parts)


@dataclass(frozen=True)
class SamplingPlan:
    """Settings for sampling from generators."""

    sampling: Sampling  # steps, noise and size
    guidance_scale: float | None  # guidance scale of policies without one of their own; None takes each family's
    seed: int  # seed of all noise
    batch_size: int | None  # pictures sampled at once; None takes as many as fit
    device: torch.device  # device of the generators

    def batch_of(self, policy: JudgedPolicy) -> int:
        """Return how many pictures of a generator are sampled at once."""
        shape = self.sampling.latent_shape(policy.trained.source().resolve_family())
        return self.batch_size or fitting_batch(shape, self.device)

    def guidance_of(self, policy: JudgedPolicy) -> float | None:
        """Return a policy's guidance scale: its own, else the plan's, else, for a generator, its family's."""
        scale = self.guidance_scale if policy.guidance_scale is None else policy.guidance_scale
        return scale if policy.images is not None else policy.trained.source().resolve_family().guidance(scale)


def sampling_task(
    policy: JudgedPolicy, plan: SamplingPlan, shown: Sequence[str]
) -> Callable[[list[list[Any]]], Iterator[list[Made]]]:
    """Load a generator, and return the function that samples a batch of ``make_pictures``."""
    generator = policy.trained.load(plan.device, plan.sampling)
    offload_text_encoders(generator, [], shown, plan.device)
    how: dict[str, Any] = {"guidance_scale": plan.guidance_of(policy), "seed": plan.seed}

    def draw(prompts: PromptBatch) -> Chosen:
        return Chosen(sample_latents(generator, prompts, plan.sampling, **how), prompts)

    return partial(draw_batch, draw, partial(decode_latents, generator), plan.seed)


def open_pictures(
    policy: JudgedPolicy,
    plan: SamplingPlan,
    rows: Sequence[PromptRow],
    wanted: Sequence[Name],
    folder: Path,
    work: SharedWork,
) -> Callable[[], dict[Name, JudgedPicture]]:
    """Open a generator's folder of pictures, and return the function that samples the missing ones of ``wanted``.

    Pictures of an earlier run with equal settings are kept. The task of ``work`` is :data:`PICTURES_OF` the folder's
    name.
    """
    task, texts = PICTURES_OF.format(folder.name), [row.prompt for row in rows]
    policy.trained.source().resolve_family().check_prompts(texts, "prompts")
    settings = {"sampling": plan.sampling, "guidance_scale": plan.guidance_of(policy), "seed": plan.seed}
    opened = ImageFolder(folder, policy.trained.identity() | plain(settings))
    opened.missing(wanted, texts)  # refuses pictures of other prompts before any generator samples

    def make() -> dict[Name, JudgedPicture]:
        make_pictures(work, task, opened, wanted, texts, plan.batch_of(policy))
        files = {name: str(opened.rows[name]["file"]) for name in wanted}
        return {(n, image): judged(n, image, file, folder / file, rows[n]) for (n, image), file in files.items()}

    return make
