"""``latentreward publish``: a checkpoint as a model folder for others, calibrated and with a card, and on the hub."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latentreward.commands.score import NoiseSettings
from latentreward.data.image_lists import ImageList, read_images
from latentreward.devices import find_device
from latentreward.errors import InputError
from latentreward.interrupts import interrupts_told
from latentreward.scoring import Calibration, Card, PublishedSettings, RewardModel
from latentreward.scoring.calibration import FEWEST
from latentreward.scoring.files import read_config
from latentreward.scoring.hub import upload
from latentreward.scoring.image_lists import ListedScoring
from latentreward.scoring.layouts.config import FolderConfig
from latentreward.scoring.layouts.model_folder import CONFIG
from latentreward.scoring.layouts.reopening import Probe
from latentreward.scoring.layouts.saving import check_target, config_of, new_folder, paths_here, write_model
from latentreward.scoring.score_inputs import require_some
from latentreward.settings.functions import run_plain_function

DECODE_THREADS = 4
FEW = 200
"""Different images of a reference below which one of its quantiles is off by some hundredths."""


@dataclass(frozen=True)
class Reference:
    """Images with prompts on which raw scores are calibrated.

    Attributes:
        images: Folder, pattern or list (.jsonl, .csv), as ``latentreward score`` takes them.
        name: What the model card calls them; by default the last part of ``images``.
        limit: Most images; of more, some are drawn.
        seed: Of the draw.
        prompt: One prompt for all images.
        allow_outside: Whether a list may name images outside its folder.
    """

    images: str
    name: str = ""
    limit: int = 2000
    seed: int = 0
    prompt: str | None = None
    allow_outside: bool = False

    def __post_init__(self) -> None:
        if self.limit < FEWEST:
            raise InputError(f"reference.limit is {self.limit}; a calibration needs at least {FEWEST} images")

    def listed(self) -> ImageList:
        """The images, of which none is opened yet.

        Raises:
            InputError: If there are none, or fewer than a calibration needs.
        """
        found = read_images(self.images, self.prompt, allow_outside=self.allow_outside)
        require_some(found)
        rows = [row for row in found.rows if row.problem is None]
        if len(rows) < FEWEST:
            raise InputError(
                f"reference.images: {self.images} has {len(rows)} images with prompts; a calibration needs at least "
                f"{FEWEST}"
            )
        if len(rows) > self.limit:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
            rows = [rows[place] for place in sorted(order[: self.limit].tolist())]
        return ImageList(found.source, tuple(rows))


def publish(
    model: str,
    output: Path,
    reference: Reference | None = None,
    noise: NoiseSettings | None = None,
    licence: str = "",
    datasets: list[str] | None = None,
    description: str = "",
    metrics: Path | None = None,
    name: str = "",
    base: str | None = None,
    base_name: str | None = None,
    run_config: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    published: PublishedSettings | None = None,
    push_to_hub: str | None = None,
    branch: str | None = None,
    private: bool | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> None:
    """Write a reward model as a folder that RewardModel.from_pretrained loads to the same scores, bit for bit.

    The folder holds the head, adapters, and what else of the weights is the model's own; the base's weights are not
    copied. It is loaded again, and its weights and the scores of two random latents are compared with those of the
    model, before it gets its name. A model folder that is already there is replaced then.

    Args:
        model: Checkpoint or folder of a run, a published layout, or a model folder, here or as a hub id.
        output: Folder to write: new, empty or a model folder.
        reference: Images with prompts on which raw scores are calibrated, e.g. --reference.images pics/list.csv.
        noise: At which noise the model is to score where none is given; what is left out stays as it is.
        licence: Of the weights: an identifier of the hub such as apache-2.0, openrail++ or other, or a text of several
            words.
        datasets: Training data: hub ids, or names; otherwise the card names the readers of the run.
        description: Markdown for the model card, or a file .md with it.
        metrics: JSON file with numbers for the model card, e.g. of latentreward benchmark.
        name: Title of the model card; by default the hub id, or the folder's name.
        base: Pipeline of the frozen weights, if not the one that the model names.
        base_name: Name of the base for others, e.g. owner/name@revision, where the model was trained on a local copy;
            by default the name of the copy's folder, which must then be given as base to load the model.
        run_config: Settings of the model's run, if not beside its checkpoint.
        revision: Branch, tag or commit, where model is a hub id.
        trust_remote_code: Whether the model's settings may name classes that are not registered, which are imported.
        published: Settings that the files of a published layout do not hold, e.g. --published.guidance 1.
        push_to_hub: Hub id owner/name to upload to; the token is that of this machine's login, or HF_TOKEN.
        branch: Branch there; by default the main one.
        private: Whether a repository that is made for it is private; by default what the owner has set.
        batch_size: Images per pass of the model.
        device: On which the reference is scored, e.g. cuda:1; auto takes the accelerator if there is one.

    Raises:
        InputError: If a setting is wrong, the model cannot be saved, or the reference cannot be scored.
    """
    check_target(output)
    title = name or push_to_hub or ""
    card = Card(title, licence, text_of(description), tuple(datasets or ()), metrics=read_metrics(metrics))
    listed = None if reference is None else reference.listed()
    loading: dict[str, Any] = {"base": base, "config": run_config, "revision": revision, "published": published}
    target = find_device(device)
    loaded = RewardModel.from_pretrained(model, device=target, trust_remote_code=trust_remote_code, **loading)
    config_of(loaded, base_name)  # what cannot be saved is not scored first
    if noise is not None:
        loaded.noise = noise.over(loaded.noise)
        if loaded.calibration is not None and not loaded.calibration.fits(loaded.noise):
            loaded.calibration = None
    if reference is not None and listed is not None:
        loaded.calibration = calibrate(loaded, reference, listed, batch_size)
    calibration, replaced = loaded.calibration, replaced_text(output)
    with new_folder(output) as partial:
        write_model(loaded, partial, card, base_name, output.resolve().name)
        probe = Probe.of(loaded)
        del loaded  # or two models would be in memory
        probe.compare(partial, target, trust_remote_code)
    for setting, path in paths_here(probe.recipe).items():
        print(f"{setting} is {path}, a path of this machine, which config.json tells others", file=sys.stderr)
    if replaced:
        print(replaced)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {size / 1e6:.1f} MB, loads again to {probe.told}; {calibration_text(calibration)}")
    if push_to_hub is not None:
        again = f"latentreward publish {output} {output} --push_to_hub {push_to_hub}"
        written = f"the folder {output} is written: later run {again}"
        try:
            with interrupts_told(lambda: written):
                print(f"uploaded: {upload(output, push_to_hub, private=private, revision=branch)}")
        except InputError as error:
            raise InputError(f"push_to_hub: {error}; {written}") from error


def replaced_text(output: Path) -> str:
    """One line about the model in the folder that is to be replaced; empty if there is none."""
    path = output / CONFIG
    if not path.is_file():
        return ""
    try:
        calibration = FolderConfig.of_record(read_config(path)).calibration
    except InputError:
        return f"{output}: replaced the model that was there, which could not be read"
    return f"{output}: replaced the model that was there ({calibration_text(calibration)})"


def calibrate(model: RewardModel, reference: Reference, listed: ImageList, batch_size: int) -> Calibration:
    """Score the reference images; those that cannot be read are left out, and counted on stderr.

    Raises:
        InputError: If too few remain, or their scores calibrate nothing.
    """
    scoring = ListedScoring(model, listed.rows, {"score": model.noise}, batch_size, DECODE_THREADS)
    tables = [table for _, table in scoring.tables([range(len(listed.rows))])]
    scores = torch.cat([torch.tensor(table["score"].drop_null().to_pylist()) for table in tables])
    problems = [text for table in tables for text in table["problem"].drop_null().to_pylist()]
    if problems:
        first = f"{len(problems)} of {len(listed.rows)} reference images are left out, the first: {problems[0]}"
        print(first, file=sys.stderr)
    different = len({row.path for row in listed.rows})
    if different < FEW:
        thin = f"reference.images: {different} different images in {len(listed.rows)} rows"
        print(f"{thin}; z_score and quantile are rough below {FEW}", file=sys.stderr)
    return Calibration.fit(scores, reference.name or Path(reference.images).name, model.noise, reference.seed)


def calibration_text(calibration: Calibration | None) -> str:
    """One line about a calibration."""
    if calibration is None:
        return "not calibrated"
    spread = f"{calibration.mean:.4g} ± {calibration.std:.4g}"
    return f"calibrated at {calibration.noise} on {calibration.number} images of {calibration.reference}: {spread}"


def text_of(description: str) -> str:
    """The text itself, or that of the file it names.

    Raises:
        InputError: If there is no such file.
    """
    if not description.endswith(".md") or "\n" in description:
        return description
    try:
        return Path(description).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"description: {description} cannot be read ({error}); give a file .md, or the text"
        ) from error


def read_metrics(path: Path | None) -> Mapping[str, Any]:
    """Numbers for the model card.

    Raises:
        InputError: If the file is no JSON object.
    """
    if path is None:
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"metrics: {path} cannot be read ({error}); give a JSON file") from error
    if not isinstance(values, dict):
        raise InputError(f"metrics: {path} holds a {type(values).__name__}; give a JSON object of names and numbers")
    return values


run = partial(run_plain_function, publish, bare=2)
