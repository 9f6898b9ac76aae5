"""Writing of a reward model as a model folder with its card, and comparison of what is loaded again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentreward import __version__
from latentreward.core.checkpoints.base_weights import sample
from latentreward.core.checkpoints.shards import require_finite
from latentreward.core.errors import InputError
from latentreward.core.reports.tables import Table, markdown_table, plain
from latentreward.core.storage.digests import file_hash
from latentreward.core.storage.durable import contents, replacing
from latentreward.core.storage.hub import is_hub_id
from latentreward.core.storage.json_files import read_config
from latentreward.diffusion.encoders.stored_prompts import StoredPrompts
from latentreward.diffusion.encoders.vae import edit_of_grey
from latentreward.reward.heads.base import AXES
from latentreward.reward.scoring.ensemble import score_given_latents
from latentreward.reward.scoring.files import write_adapter
from latentreward.reward.scoring.find import name_of
from latentreward.reward.scoring.recipe import ModelPart, is_ours, own_parts, recipe_in_python
from latentreward.reward.scoring.stored import (
    BACKBONE,
    BASE,
    CONFIG,
    FORMAT,
    HEAD,
    FolderConfig,
    PretrainedReward,
    adapter_folders,
    adapters_of,
    base_samples,
    own_weights,
)

if TYPE_CHECKING:
    from latentreward.reward.scoring.reward_model import RewardModel

README = "README.md"
OURS = (CONFIG, HEAD, BACKBONE, BASE, README)
"""Names of the files in a model folder; folders whose names begin with ``adapter`` lie beside them."""
LICENCE_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9.+-]*")
"""Pattern of a licence that is treated as an identifier of the hub, not as a text."""
PROMPTS = ("a red cube on a blue sphere", "") * 2  # a CPU's batches have four rows or one, see ``ROWS``
SIDE = 256  # side, in pixels, of the square images whose latent size the comparison uses
RELATIVE, ABSOLUTE = 1e-4, 1e-5
"""Tolerances for scores: an accelerator may choose other kernels for the second copy of the model."""


@dataclass(frozen=True)
class Card:
    """Contents of a model card that the model itself does not know.

    Attributes:
        name: Hub id or title; empty takes the folder's name.
        licence: Licence of the weights: an identifier of the hub such as ``apache-2.0``, ``openrail++`` or ``other``,
            or a text of several words.
        description: Description of the model, Markdown.
        datasets: Training data, as hub ids or names; empty takes the names of the run's readers.
    """

    name: str = ""
    licence: str = ""
    description: str = ""
    datasets: tuple[str, ...] = ()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write a model into; it replaces ``folder`` if the block ends without an error.

    If ``folder`` is a link, the folder that the link points to is replaced.
    """
    folder = folder.resolve()
    check_target(folder)
    with replacing(folder) as partial:
        partial.mkdir()
        yield partial


def write_model(model: RewardModel, folder: Path, card: Card, base: str | None, name: str) -> None:
    """Write the files of ``model`` into the empty ``folder``."""
    config = config_of(model, base)
    require_finite(dict(model.named_parameters()), "the reward model")
    backbone, own = model.backbone, config.own_weights
    write_tensors(model.head.state_dict().items(), folder / HEAD)
    for part, place in adapter_folders(config.adapters).items():
        write_adapter(backbone.get_submodule(part), folder / place, config.base)
    if own:
        write_tensors(own_weights(backbone, own), folder / BACKBONE)
    write_tensors(base_samples(backbone, own), folder / BASE)
    weights = sorted(folder.rglob("*.safetensors"))
    config = replace(config, sha256={path.relative_to(folder).as_posix(): file_hash(path) for path in weights})
    (folder / README).write_text(model_card(config, card, name), encoding="utf-8")
    (folder / CONFIG).write_text(config.text(), encoding="utf-8")


def config_of(model: RewardModel, base: str | None = None) -> FolderConfig:
    """Build the contents of ``config.json`` for ``model``; raise InputError if the model cannot be saved."""
    backbone = model.backbone
    if model.recipe is None and not any(weight.requires_grad for weight in model.parameters()):
        raise InputError(
            "the model was built in Python and has no trainable weights, so its trained weights cannot be told from "
            "those of its base; save it before you freeze it"
        )
    recipe = model.recipe or recipe_in_python(backbone, model.head)
    recipe = recipe.with_own(own_parts(backbone))
    if model.dtype != torch.float32:
        rounded = f"{str(model.dtype).removeprefix('torch.')}, which rounds its weights"
        raise InputError(f"the model was loaded in {rounded}; load it in float32 to save it")
    if isinstance(backbone.text_encoder, StoredPrompts):
        raise InputError("EncodeOnce has freed the model's text encoders; load a checkpoint of the run, then save it")
    if backbone.vae is None or backbone.text_encoder is None:
        part = "VAE" if backbone.vae is None else "text encoder"
        raise InputError(
            f"the model has no {part} and could not score images after it is loaded again; load it with base=a whole "
            "pipeline, then save it"
        )
    if base is not None:
        source, _, revision = base.partition("@")
        recipe = recipe.on(source, revision or None)
    elif (place := recipe.backbone.init_args.get("source")) and Path(place).exists():
        recipe = recipe.on(name_of(place))  # a path of this machine would mean nothing to others
    return FolderConfig(
        backbone=recipe.backbone,
        head=recipe.head,
        own_weights=recipe.own,
        adapters=adapters_of(backbone),
        base=recipe.source,
        noise=model.noise,
        image_sizes=model.image_sizes,
        exif=model.exif,
        edits=model.edits,
        calibration=model.calibration,
        training=recipe.training,
    )


def check_target(folder: Path) -> None:
    """Raise InputError if ``folder`` is a file, or a folder that is neither empty nor a model folder."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"folder {str(folder)!r} is a file; choose another name")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise InputError(f"folder {str(folder)!r} holds the current folder, which would be removed; choose another one")
    found = contents(folder)
    foreign = [name for name in found if name not in OURS and not name.startswith("adapter")]
    if found and (foreign or read_config(folder / CONFIG).get("format") != FORMAT):
        reason = f"it holds {(foreign or found)[0]}"
        raise InputError(
            f"folder {str(folder)!r} is not a model folder that may be replaced ({reason}); choose an empty one"
        )


def write_tensors(tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Write named tensors to a safetensors file; tensors that share memory are copied, which safetensors requires."""
    state: dict[str, Tensor] = {}
    places = set()
    for name, tensor in tensors:
        whole = tensor.detach().cpu().contiguous()
        state[name] = whole.clone() if whole.data_ptr() in places else whole
        places.add(whole.data_ptr())
    save_file(state, path, metadata={"format": "pt"})


def probe(model: RewardModel) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return a few values of each weight of a model by name, and its scores of four random latents.

    The latents have the size of a square image that the model has resized; None if it has no rule for image sizes.
    """
    named = chain(model.named_parameters(), model.named_buffers())
    weights = {name: sample(tensor.detach()) for name, tensor in named if tensor.numel()}
    if model.image_sizes is None:
        return weights, None
    loader, space = model.image_sizes.loader(SIDE, SIDE), model.backbone.latent_space
    shape = (len(PROMPTS), *space.shape(loader.height, loader.width, model.image_sizes.frames))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    prompts = [edit_of_grey(prompt, model.backbone.sources[0]) for prompt in PROMPTS]
    return weights, score_given_latents(model, prompts, latents, model.noise, None, None, len(PROMPTS)).cpu()


def check_folder(
    kind: type[RewardModel],
    folder: Path,
    before: tuple[dict[str, Tensor], Tensor | None],
    part: ModelPart,
    device: torch.device,
    trusted: bool,
) -> None:
    """Load a written folder as another user would, on the base of the backbone ``part``; compare its :func:`probe`."""
    stored = PretrainedReward(folder, None, trusted)
    if "source" in part.init_args:
        stored.recipe = stored.recipe.on(part.init_args["source"], part.init_args.get("revision"))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)  # to detect weights that a factory draws from the global generator
            weights, scores = probe(stored.load(kind).to(device).set_precision(torch.float32))
    except InputError as error:
        raise InputError(f"the model does not load again once it is saved: {error}") from error
    for name in sorted(before[0].keys() | weights.keys()):
        ours, theirs = before[0].get(name), weights.get(name)
        if ours is None or theirs is None or not torch.equal(ours, theirs):
            remedy = "report it" if is_ours(part) else f"{part.name} must give it the same value at each start"
            raise InputError(f"{name} differs once the model is saved and loaded again; {remedy}")
    expected = before[1]
    if scores is None or expected is None or torch.allclose(scores, expected, rtol=RELATIVE, atol=ABSOLUTE):
        return
    first, second = (found.flatten()[0].item() for found in (expected, scores))
    raise InputError(
        f"the score is {second:.6g} instead of {first:.6g} once the model is saved and loaded again; keep what its "
        "backbone and head compute with in parameters, buffers or settings, and draw nothing at random"
    )


def model_card(config: FolderConfig, card: Card, name: str) -> str:
    """Return the text of ``README.md``: use, meaning of the scores, training, metrics and licence."""
    from huggingface_hub import ModelCardData  # not for `--help`

    title, recipe, source = card.name or name, config.recipe, config.recipe.backbone.init_args.get("source")
    linked = isinstance(source, str) and is_hub_id(source) and not Path(source).exists()
    identified = LICENCE_ID.fullmatch(card.licence)
    licence_name = re.sub(r"[^a-z0-9.+-]+", "-", card.licence.lower()).strip("-") or "other"
    front = ModelCardData(
        license=card.licence if identified else "other",
        license_name=licence_name if card.licence and not identified else None,
        library_name="latentreward",
        tags=["reward-model", "latent-reward", f"{'image' if config.edits else 'text'}-to-image", "human-preference"],
        base_model=source if linked else None,
        datasets=[name for name in card.datasets if is_hub_id(name)] or None,
    ).to_yaml()
    base = plain(source if linked else config.base or recipe.backbone.name)
    licence = f"Weights in this folder: {plain(card.licence)}." if card.licence else "The author stated no licence."
    judged = (
        "how well a picture was edited as an instruction says" if config.edits else "how good an image is for a prompt"
    )
    sections = [
        f"# {plain(title)}",
        card.description.strip(),
        f"A latent reward model: it scores {judged}, as its training data say, from noisy latents in {base}'s own "
        f"latent space. Higher is better. Written by latentreward {__version__}.",
        usage(title if is_hub_id(title) else f"path/to/{Path(title).name}", config),
        section("Scores", score_rows(config)),
        section("Training", training_rows(config, card)),
        f"## Licence\n\n{licence} The weights work only with their base, {base}, whose own terms hold as well.",
    ]
    return f"---\n{front}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def usage(source: str, config: FolderConfig) -> str:
    """Return the section that shows how to score an image."""
    named, needs = config.recipe.local_name, ""
    base = f", base='path/to/{named}'" if named else ""
    parts = config.backbone.name, config.head.name
    if modules := dict.fromkeys(name.rpartition(".")[0] for name in parts if "." in name):
        base += ", trust_remote_code=True"
        needs = f"It runs code of its author, the modules {', '.join(modules)}, which have to be installed.\n\n"
    edits, scored = "", '["a red fox in the snow"], ["fox.png"]'
    if config.edits:
        edits, scored = ", edit_prompt", '[edit_prompt("make the car red", "car.png")], ["red_car.png"]'
    calibrated = "reward.calibration.quantile(scores)  # share of the reference set that scores lower\n"
    return (
        f"## Use\n\n{needs}```python\nfrom latentreward.reward import RewardModel{edits}\n\n"
        f"reward = RewardModel.from_pretrained({source!r}{base})\n"
        f"scores = reward.score({scored})\n{calibrated if config.calibration else ''}```"
    )


def score_rows(config: FolderConfig) -> Iterator[tuple[str, Any]]:
    """Yield the rows of the table on scores: noise, image sizes and calibration."""
    noise, calibration = config.noise, config.calibration
    levels = ", ".join(f"{level:g}" for level in noise.sigmas or noise.timesteps)
    yield "noise levels" if noise.sigmas else "timesteps", levels
    yield "seeds", ", ".join(map(str, noise.seeds))
    if axes := config.head.init_args.get("axes"):
        weights = ", ".join(f"{weight:g} × {name}" for weight, name in zip(axes, AXES, strict=True))
        yield "score", f"{weights}, summed; `reward.score(..., axes=True)` gives both"
    yield "image sizes (height x width)", config.image_sizes
    yield "EXIF orientation of images", "applied" if config.exif == "apply" else "ignored"
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


def section(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    """Return a section with a table of names and values; of equal names the last counts, None is left out."""
    shown = tuple((name, str(value)) for name, value in dict(rows).items() if value is not None)
    return f"## {title}\n\n{markdown_table(Table(('', ''), shown))}"
