"""Write a reward model as a folder that loads to the same scores, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentreward.checkpoints.base_weights import sample
from latentreward.checkpoints.shards import require_finite
from latentreward.errors import InputError
from latentreward.interrupts import interrupts_held
from latentreward.scoring.files import read_config
from latentreward.scoring.layouts.adapters import write_adapter
from latentreward.scoring.layouts.card import Card, model_card
from latentreward.scoring.layouts.config import FORMAT, FolderConfig
from latentreward.scoring.layouts.model_folder import (
    BACKBONE,
    BASE,
    CONFIG,
    HEAD,
    adapter_folders,
    adapters_of,
    base_weights,
    own_weights,
)
from latentreward.scoring.layouts.recipe import ModelRecipe
from latentreward.scoring.network import RewardNetwork, name_of
from latentreward.storage.durable import (
    contents,
    discard,
    put_in_place,
    settle,
    sync,
    temporary_name,
    write_errors_named,
)

README = "README.md"
OURS = (CONFIG, HEAD, BACKBONE, BASE, README)
"""Files of a model folder; beside them stand folders of adapters."""


def save_pretrained(model: RewardNetwork, folder: Path, card: Card, base: str | None = None) -> None:
    """Write ``model`` into ``folder``; see :meth:`RewardModel.save_pretrained`.

    Of a link, the folder that it leads to is written. The current folder stays the same one and is filled,
    ``config.json`` last: without it nothing loads.
    """
    config = config_of(model, base)
    require_finite(dict(model.named_parameters()), "the reward model")
    folder = folder.resolve()
    check_target(folder)
    partial = temporary_name(folder)
    try:
        with write_errors_named(folder):
            partial.mkdir(parents=True)
            write_weights(model, config, partial)
            (partial / README).write_text(model_card(config, card, folder.name), encoding="utf-8")
            (partial / CONFIG).write_text(config.text(), encoding="utf-8")
            if folder == Path.cwd():
                with interrupts_held():
                    fill(folder, partial)
            else:
                put_in_place(partial, folder)
    finally:
        discard(partial)


def config_of(model: RewardNetwork, base: str | None = None) -> FolderConfig:
    """What the folder of ``model`` will say.

    Raises:
        InputError: If the model cannot be built again from files.
    """
    recipe: ModelRecipe | None = model.recipe
    if recipe is None:
        raise InputError(
            "the model was put together in Python and does not know how to build itself again; save one that "
            "RewardModel.from_pretrained loaded, such as its run's checkpoint, or set its recipe"
        )
    if model.dtype != torch.float32:
        raise InputError(
            f"the model was loaded in {str(model.dtype).removeprefix('torch.')}, which rounds its weights; load it in "
            "float32 to save it"
        )
    backbone = model.backbone
    if backbone.vae is None or backbone.text_encoder is None:
        part = "VAE" if backbone.vae is None else "text encoder"
        raise InputError(
            f"the model has no {part} and could score no image once it is loaded again; load it with base=a whole "
            "pipeline, then save it"
        )
    if base is not None:
        source, _, revision = base.partition("@")
        recipe = recipe.on(source, revision or None)
    elif (place := recipe.backbone.init_args.get("source")) and Path(place).exists():
        recipe = recipe.on(name_of(place))  # others have no use for a path of this machine
    settings = {"backbone.init_args": recipe.backbone.init_args, "head.init_args": recipe.head.init_args}
    for name, value in settings.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"the model's recipe cannot be saved: {name}: {error}; give plain values") from error
    return FolderConfig(
        recipe, adapters_of(backbone), model.noise, model.image_sizes, model.calibration, recipe.source, model.exif
    )


def check_target(folder: Path) -> None:
    """Raise InputError if writing to ``folder`` would replace anything but a model folder."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"folder {str(folder)!r} is a file; choose another name")
    found = contents(folder)
    if not found:
        return
    foreign = [name for name in found if name not in OURS and not name.startswith("adapter")]
    if foreign or CONFIG not in found or read_config(folder / CONFIG).get("format") != FORMAT:
        raise InputError(
            f"folder {str(folder)!r} holds {(foreign or found)[0]} and is no model folder that may be replaced; choose "
            "an empty or a new one"
        )


def fill(folder: Path, partial: Path) -> None:
    """Put what lies in ``partial`` into ``folder`` instead of the model there."""
    settle(partial)
    (folder / CONFIG).unlink(missing_ok=True)
    for path in folder.iterdir():
        discard(path)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == CONFIG):
        path.replace(folder / path.name)
    sync(folder)


def write_weights(model: RewardNetwork, config: FolderConfig, folder: Path) -> None:
    """Head, adapters, whole parts, and what tells the base."""
    backbone, own = model.backbone, config.recipe.own
    write_tensors(model.head.state_dict().items(), folder / HEAD)
    for name, place in adapter_folders(config.adapters).items():
        write_adapter(backbone.get_submodule(name), folder / place, config.trained_on)
    if own:
        write_tensors(own_weights(backbone, own), folder / BACKBONE)
    samples: Mapping[str, Tensor] = {name: sample(weight.detach()) for name, weight in base_weights(backbone, own)}
    write_tensors(samples.items(), folder / BASE)


def write_tensors(tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """A safetensors file; tensors that share memory are written each."""
    state: dict[str, Tensor] = {}
    places = set()
    for name, tensor in tensors:
        whole = tensor.detach().cpu().contiguous()
        state[name] = whole.clone() if whole.data_ptr() in places else whole
        places.add(whole.data_ptr())
    save_file(state, path, metadata={"format": "pt"})
