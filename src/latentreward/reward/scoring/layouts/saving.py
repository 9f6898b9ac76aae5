"""Writing of a reward model as a model folder, and the comparison of what is loaded from it again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentreward.core.checkpoints.base_weights import sample
from latentreward.core.checkpoints.shards import require_finite
from latentreward.core.errors import InputError
from latentreward.core.settings.errors import leaves
from latentreward.core.storage.digests import file_hash
from latentreward.core.storage.durable import contents, replacing
from latentreward.core.storage.json_files import read_config
from latentreward.diffusion.encoders.stored_prompts import StoredPrompts
from latentreward.diffusion.encoders.vae import edit_of_grey
from latentreward.reward.scoring.ensemble import score_given_latents
from latentreward.reward.scoring.files import write_adapter
from latentreward.reward.scoring.layouts.card import Card, model_card
from latentreward.reward.scoring.layouts.model_folder import (
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
from latentreward.reward.scoring.layouts.recipe import (
    ModelRecipe,
    is_ours,
    own_parts,
    recipe_in_python,
)
from latentreward.reward.scoring.network import RewardNetwork, name_of

README = "README.md"
OURS = (CONFIG, HEAD, BACKBONE, BASE, README)
"""Names of the files in a model folder; folders whose names begin with ``adapter`` lie beside them."""


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


def write_model(model: RewardNetwork, folder: Path, card: Card, base: str | None, name: str) -> None:
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


def config_of(model: RewardNetwork, base: str | None = None) -> FolderConfig:
    """Build the contents of ``config.json`` for ``model``."""
    if model.recipe is None and not any(weight.requires_grad for weight in model.parameters()):
        raise InputError(
            "the model was built in Python and has no trainable weights, so its trained weights cannot be told from "
            "those of its base; save it before you freeze it"
        )
    recipe = model.recipe or recipe_in_python(model.backbone, model.head)
    recipe = recipe.with_own(own_parts(model.backbone))
    if model.dtype != torch.float32:
        rounded = f"{str(model.dtype).removeprefix('torch.')}, which rounds its weights"
        raise InputError(f"the model was loaded in {rounded}; load it in float32 to save it")
    backbone = model.backbone
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
    for name, made in (("backbone", recipe.backbone), ("head", recipe.head)):
        try:
            json.dumps(made.init_args)
        except (TypeError, ValueError) as error:
            raise InputError(f"the model's recipe cannot be saved: {name}.init_args: {error}") from error
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


def paths_here(recipe: ModelRecipe) -> dict[str, str]:
    """Return settings of backbone and head that are absolute paths, by name; the base pipeline is left out."""
    settings = {"backbone.init_args": recipe.backbone.init_args, "head.init_args": recipe.head.init_args}
    named = ((f"{part}.{name}", value) for part, record in settings.items() for name, value in leaves(record))
    texts = {name: value for name, value in named if isinstance(value, str) and name != "backbone.init_args.source"}
    return {name: value for name, value in texts.items() if Path(value).is_absolute()}


def check_target(folder: Path) -> None:
    """Raise InputError if ``folder`` is a file, or a folder that is neither empty nor a model folder."""
    problem, seen = target_problem(folder), None
    while problem != seen:  # another process may have replaced the folder while it was read, half removed
        problem, seen = target_problem(folder), problem
    if problem is not None:
        raise InputError(problem)


def target_problem(folder: Path) -> str | None:
    """Tell why ``folder`` may not be replaced; None if it may."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        return f"folder {str(folder)!r} is a file; choose another name"
    if Path.cwd().is_relative_to(folder.resolve()):
        return f"folder {str(folder)!r} holds the current folder, which would be removed; choose another one"
    try:
        found = contents(folder)
        foreign = [name for name in found if name not in OURS and not name.startswith("adapter")]
        if not found or (not foreign and read_config(folder / CONFIG).get("format") == FORMAT):
            return None
    except (InputError, FileNotFoundError) as error:
        return f"folder {str(folder)!r} is not a model folder that may be replaced ({error}); choose an empty one"
    held = (foreign or found)[0]
    return f"folder {str(folder)!r} holds {held} and is not a model folder that may be replaced; choose an empty one"


def write_tensors(tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Write named tensors to a safetensors file; tensors that share memory are copied, which safetensors requires."""
    state: dict[str, Tensor] = {}
    places = set()
    for name, tensor in tensors:
        whole = tensor.detach().cpu().contiguous()
        state[name] = whole.clone() if whole.data_ptr() in places else whole
        places.add(whole.data_ptr())
    save_file(state, path, metadata={"format": "pt"})


PROMPTS = ("a red cube on a blue sphere", "") * 2  # a CPU's batches have four rows or one, see ``ROWS``
SIDE = 256  # side, in pixels, of the square images whose latent size the check uses
RELATIVE, ABSOLUTE = 1e-4, 1e-5
"""Tolerances for scores: an accelerator may choose other kernels for the second copy of the model."""


@dataclass(frozen=True)
class Probe:
    """Sampled weights and four scores of a model, small enough to keep after the model itself is freed."""

    recipe: ModelRecipe  # recipe of the model, with the base that it was loaded on
    weights: dict[str, Tensor]  # A few values of each parameter and buffer, by name
    # Scores of four random latents with a fixed seed, in the size of a square image that the model has resized:
    # ``(4,)`` or ``(4, out_dim)``; None if the model has no rule for image sizes
    scores: Tensor | None

    @property
    def summary(self) -> str:
        """Description of a successful comparison, for messages."""
        return "equal weights" if self.scores is None else "equal weights and scores"

    @classmethod
    def of(cls, model: RewardNetwork) -> Self:
        """Sample the weights of ``model`` and compute its scores; raise ValueError if the model has no recipe."""
        if model.recipe is None:
            raise ValueError("the model has no recipe")
        named = chain(model.named_parameters(), model.named_buffers())
        weights = {name: sample(tensor.detach()) for name, tensor in named if tensor.numel()}
        if model.image_sizes is None:
            return cls(model.recipe, weights, None)
        loader, space = model.image_sizes.loader(SIDE, SIDE), model.backbone.latent_space
        shape = (len(PROMPTS), *space.shape(loader.height, loader.width, model.image_sizes.frames))
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        prompts = [edit_of_grey(prompt, model.backbone.sources[0]) for prompt in PROMPTS]
        scores = score_given_latents(model, prompts, latents, model.noise, None, None, len(PROMPTS))
        return cls(model.recipe, weights, scores.cpu())

    def compare(self, folder: Path, device: torch.device, trusted: bool) -> None:
        """Load ``folder`` as another user would, but on this machine's copy of the base; compare weights and scores."""
        stored = PretrainedReward(folder, None, trusted)
        built = self.recipe.backbone
        if "source" in built.init_args:
            stored.recipe = stored.recipe.on(built.init_args["source"], built.init_args.get("revision"))
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)  # to detect weights that a factory draws from the global generator
                again = Probe.of(stored.load(RewardNetwork).to(device).set_precision(torch.float32))
        except InputError as error:
            raise InputError(f"the model does not load again once it is saved: {error}") from error
        for name in sorted(self.weights.keys() | again.weights.keys()):
            ours, theirs = self.weights.get(name), again.weights.get(name)
            if ours is None or theirs is None or not torch.equal(ours, theirs):
                raise InputError(
                    f"{name} differs once the model is saved and loaded again; "
                    + ("report it" if is_ours(built) else f"{built.name} must give it the same value at each start")
                )
        if self.scores is None or again.scores is None:
            return
        if not torch.allclose(again.scores, self.scores, rtol=RELATIVE, atol=ABSOLUTE):
            first, second = (scores.flatten()[0].item() for scores in (self.scores, again.scores))
            raise InputError(
                f"the score is {second:.6g} instead of {first:.6g} once the model is saved and loaded again; keep what "
                "its backbone and head compute with in parameters, buffers or settings, and draw nothing at random"
            )
