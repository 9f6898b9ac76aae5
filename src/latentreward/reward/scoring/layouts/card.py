"""Model card (``README.md``) of a model folder: use, meaning of the scores, training, metrics and licence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentreward import __version__
from latentreward.core.reports.tables import Table, markdown_table, plain
from latentreward.core.storage.hub import is_hub_id
from latentreward.reward.heads.base import AXES
from latentreward.reward.scoring.layouts.model_folder import FolderConfig

LICENCE_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9.+-]*")
"""Pattern of a licence that is treated as an identifier of the hub, not as a text."""
MOST_METRICS = 60  # largest number of metrics in a card


@dataclass(frozen=True)
class Card:
    """Contents of a model card that the model itself does not know.

    Attributes:
        name: Hub id or title; empty takes the folder's name.
        licence: Licence of the weights: an identifier of the hub such as ``apache-2.0``, ``openrail++`` or ``other``,
            or a text of several words.
        description: Description of the model, Markdown.
        datasets: Training data, as hub ids or names; empty takes the names of the run's readers.
        training: Further rows of the card's table on training, e.g. number of pairs, learning rate, hardware.
        metrics: Numbers to list, by name; mappings may be nested.
    """

    name: str = ""
    licence: str = ""
    description: str = ""
    datasets: tuple[str, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


def model_card(config: FolderConfig, card: Card, name: str) -> str:
    """Return the text of ``README.md``."""
    title, metrics = card.name or name, list(flat(card.metrics))
    more = f"\n\n{len(metrics) - MOST_METRICS} more are not shown." if len(metrics) > MOST_METRICS else ""
    base = plain(base_on_hub(config) or config.base or config.recipe.backbone.name)
    licence = f"Weights in this folder: {plain(card.licence)}." if card.licence else "The author stated no licence."
    judged = (
        "how well a picture was edited as an instruction says" if config.edits else "how good an image is for a prompt"
    )
    sections = [
        f"# {plain(title)}",
        card.description.strip(),
        f"A latent reward model: it scores {judged}, as its training data say, from noisy "
        f"latents in {base}'s own latent space. Higher is better. Written by "
        f"latentreward {__version__}.",
        usage(title if is_hub_id(title) else f"path/to/{Path(title).name}", config),
        section("Scores", score_rows(config)),
        section("Training", training_rows(config, card)),
        section("Metrics", metrics[:MOST_METRICS]) + more if metrics else "",
        f"## Licence\n\n{licence} The weights work only with their base, {base}, whose own terms hold as well.",
    ]
    return f"---\n{front_matter(config, card)}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def front_matter(config: FolderConfig, card: Card) -> str:
    """Return the metadata that the hub reads, as YAML."""
    from huggingface_hub import ModelCardData  # not for `--help`

    identified = LICENCE_ID.fullmatch(card.licence)
    name = re.sub(r"[^a-z0-9.+-]+", "-", card.licence.lower()).strip("-") or "other"
    return ModelCardData(
        license=card.licence if identified else "other",
        license_name=name if card.licence and not identified else None,
        library_name="latentreward",
        tags=["reward-model", "latent-reward", f"{'image' if config.edits else 'text'}-to-image", "human-preference"],
        base_model=base_on_hub(config),
        datasets=[name for name in card.datasets if is_hub_id(name)] or None,
    ).to_yaml()


def base_on_hub(config: FolderConfig) -> str | None:
    """Return the hub id of the base pipeline; None if the base is a local folder or unnamed."""
    source = config.recipe.backbone.init_args.get("source")
    is_id = isinstance(source, str) and is_hub_id(source) and not Path(source).exists()
    return str(source) if is_id else None


def usage(source: str, config: FolderConfig) -> str:
    """Return the section that shows how to score an image."""
    named = config.recipe.local_name
    base = f", base='path/to/{named}'" if named else ""
    needs = ""
    if modules := own_modules(config):
        base += ", trust_remote_code=True"
        needs = f"It runs code of its author, the modules {', '.join(modules)}, which have to be installed.\n\n"
    edits = ", edit_prompt" * bool(config.edits)
    prompt, image = '"a red fox in the snow"', "fox"
    if config.edits:
        prompt, image = 'edit_prompt("make the car red", "car.png")', "red_car"
    calibrated = "\nreward.calibration.quantile(scores)  # share of the reference set that scores lower\n"
    return (
        f"## Use\n\n{needs}```python\nfrom latentreward.reward import RewardModel{edits}\n\n"
        f"reward = RewardModel.from_pretrained({source!r}{base})\n"
        f'scores = reward.score([{prompt}], ["{image}.png"])\n'
        f"{calibrated.lstrip() if config.calibration else ''}```"
    )


def own_modules(config: FolderConfig) -> list[str]:
    """Return the modules of the author that the model's classes need; names of registered classes have no dots."""
    parts = config.recipe.backbone.name, config.recipe.head.name
    return list(dict.fromkeys(name.rpartition(".")[0] for name in parts if "." in name))


def score_rows(config: FolderConfig) -> Iterator[tuple[str, Any]]:
    """Yield the rows of the table on scores: noise, image sizes and calibration."""
    noise = config.noise
    levels = ", ".join(f"{level:g}" for level in noise.sigmas or noise.timesteps)
    yield "noise levels" if noise.sigmas else "timesteps", levels
    yield "seeds", ", ".join(map(str, noise.seeds))
    yield "noise shared by", "images of one prompt" if noise.noise_key == "prompt" else "nothing: each image its own"
    if axes := config.recipe.head.init_args.get("axes"):
        weights = ", ".join(f"{weight:g} × {name}" for weight, name in zip(axes, AXES, strict=True))
        yield "score", f"{weights}, summed; `reward.score(..., axes=True)` gives both"
    if config.image_sizes is not None:
        yield "image sizes (height x width)", str(config.image_sizes)
    yield "EXIF orientation of images", "applied" if config.exif == "apply" else "ignored"
    calibration = config.calibration
    if calibration is None:
        yield "calibration", "none: raw scores compare images under this model alone"
        return
    yield "calibrated on", f"{calibration.reference}: {calibration.number} images, seed {calibration.seed}"
    yield "raw mean ± standard deviation there", f"{calibration.mean:.4g} ± {calibration.std:.4g}"
    last = len(calibration.quantiles) - 1
    shown = (calibration.quantiles[round(share * last)] for share in (0.05, 0.5, 0.95))
    yield "raw 5 %, 50 %, 95 % quantiles there", ", ".join(f"{value:.4g}" for value in shown)


def training_rows(config: FolderConfig, card: Card) -> Iterator[tuple[str, Any]]:
    """Yield the rows of the table on training: base, data, backbone, head and trained modules."""
    recipe = config.recipe
    shipped = ", shipped with latentreward" * ("." not in recipe.backbone.name)
    yield "base", config.base or f"that of {recipe.backbone.name}{shipped}"
    yield "data", ", ".join(card.datasets) or recipe.training.get("data") or "not stated"
    yield "backbone", recipe.backbone.name
    yield "head", recipe.head.name
    yield "trained as a whole", ", ".join(recipe.own) or "nothing of the base"
    yield "trained by LoRA", ", ".join(config.adapters) or "nothing"
    yield from (row for row in recipe.training.items() if row[0] != "data")
    yield from card.training.items()


def section(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    """Return a section with a table of pairs of name and value.

    Of several rows with one name the last counts; rows with None are left out.
    """
    shown = tuple((name, str(value)) for name, value in dict(rows).items() if value is not None)
    return f"## {title}\n\n{markdown_table(Table(('', ''), shown))}"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the numbers and texts in nested mappings by dotted name; lists are left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:.4g}"
        elif isinstance(value, int | str):
            yield f"{prefix}{name}", value
