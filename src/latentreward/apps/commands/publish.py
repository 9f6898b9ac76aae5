"""``latentreward publish``: write a reward model as a folder with calibration and model card."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, check_range, errors_at, printable
from latentreward.core.running import find_device
from latentreward.core.settings.functions import run_function
from latentreward.core.storage.durable import check_writable
from latentreward.reward import Calibration, Card, ModelSource, RewardModel
from latentreward.reward.scoring.publishing import (
    check_folder,
    check_target,
    config_of,
    new_folder,
    probe,
    write_model,
)
from latentreward.reward.scoring.scoring_noise import FEWEST, NoiseSettings

if TYPE_CHECKING:
    from latentreward.data.image_lists import ImageList

FEW = 200
"""Number of distinct reference images below which quantiles have errors of a few hundredths, and a warning is shown."""


@dataclass(frozen=True)
class Reference:
    """Reference images with prompts, on which raw scores are calibrated.

    Attributes:
        images: Folder, pattern or list (.jsonl, .csv), as ``latentreward score`` takes them.
        name: Name of the reference in the model card; by default the last part of ``images``.
        limit: Most images to score; from more images a random subset is taken.
        seed: Seed of the random subset.
        prompt: One prompt for all images.
        allow_outside: Whether a list may name images outside its folder.
    """

    images: PathText
    name: str = ""
    limit: int = 2000
    seed: int = 0
    prompt: str | None = None
    allow_outside: bool = False

    def __post_init__(self) -> None:
        check_range(f"[{FEWEST}, inf)", "a calibration needs as many images", **{"reference.limit": self.limit})

    def listed(self) -> "ImageList":
        """List the images without opening them; raise InputError for fewer than a calibration needs."""
        from latentreward.data.image_lists import ImageList, read_images  # not for `--help`
        from latentreward.reward.scoring.image_lists import require_some

        with errors_at("reference: "):
            found = read_images(self.images, self.prompt, allow_outside=self.allow_outside)
        require_some(found)
        rows = [row for row in found.rows if row.problem is None]
        if len(rows) < FEWEST:
            few = f"reference.images: {self.images} has {len(rows)} images with prompts"
            raise InputError(f"{few}; a calibration needs at least {FEWEST}")
        if len(rows) > self.limit:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
            rows = [rows[index] for index in sorted(order[: self.limit].tolist())]
        return ImageList(found.source, tuple(rows))


def publish(
    model: PathText,
    output: Path,
    reference: Reference | None = None,
    noise: NoiseSettings | None = None,
    licence: str = "",
    datasets: list[str] | None = None,
    description: str = "",
    name: str = "",
    base_name: str | None = None,
    run_config: PathText | None = None,
    batch_size: int = 8,
    device: str = "auto",
    **loading: Any,
) -> None:
    """Write a reward model as a folder that RewardModel.from_pretrained loads to the same scores, bit for bit.

    The folder holds the head, adapters, and other weights that training changed or added; the weights of the frozen
    base are not copied. Before the folder gets its name, it is loaded again: its weights and the scores of four random
    latents must equal those of the model. An existing model folder is replaced only then.

    Args:
        model: Checkpoint or folder of a run, folder or hub id in a published layout, or model folder or its hub id.
        output: Folder to write: a new or empty folder, or a model folder to replace.
        reference: Images with prompts on which raw scores are calibrated, e.g. --reference.images pics/list.csv.
        noise: Default noise of the written model; a setting that is left out keeps the model's value.
        licence: Licence of the weights: an identifier of the hub such as apache-2.0, openrail++ or other, or a text of
            several words.
        datasets: Training data for the model card: hub ids or names; by default the card names the run's readers.
        description: Markdown for the model card.
        name: Title of the model card, e.g. the hub id that the folder will have; by default the folder's name.
        base_name: Name under which others find the base, e.g. owner/name@revision, if the model was trained on a local
            copy. By default the name of the copy's folder is written, and base must be given to load the model.
        run_config: Config file of the model's training run; by default the one beside the checkpoint.
        batch_size: Images per forward pass.
        device: Device that scores the reference, e.g. cuda:1; auto takes an accelerator if there is one.
        loading: See :class:`~latentreward.reward.ModelSource`.
    """
    check_target(output)
    check_writable(output)
    card = Card(name, licence, description, tuple(datasets or ()))
    listed = None if reference is None else reference.listed()
    source, target = ModelSource(model, config=run_config, **loading), find_device(device)
    loaded = RewardModel.from_pretrained(source, device=target)
    config_of(loaded, base_name)  # refuses a model that cannot be saved before the reference is scored
    if noise is not None:
        loaded.noise = noise.over(loaded.noise)
        if loaded.calibration is not None and not loaded.calibration.fits(loaded.noise):
            loaded.calibration = None
    if reference is not None and listed is not None:
        loaded.calibration = calibrate(loaded, reference, listed, batch_size)
    calibration, recipe, before = loaded.calibration, loaded.recipe, probe(loaded)
    assert recipe is not None
    with new_folder(output) as partial:
        write_model(loaded, partial, card, base_name, output.resolve().name)
        del loaded  # frees memory before the written model is loaded
        check_folder(RewardModel, partial, before, recipe.backbone, target, source.trust_remote_code)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    equal = "equal weights" if before[1] is None else "equal weights and scores"
    print(f"{output}: {size / 1e6:.1f} MB, loads again to {equal}; {calibration_text(calibration)}")


def calibrate(model: RewardModel, reference: Reference, listed: "ImageList", batch_size: int) -> Calibration:
    """Fit a calibration to the scores of the reference images; those that cannot be read are counted on stderr."""
    from latentreward.reward.scoring.image_lists import ListedScoring  # not for `--help`

    scoring = ListedScoring(model, listed.rows, {"score": model.noise}, batch_size, decode_threads=4)
    table = scoring.table(range(len(listed.rows)))
    rows = list(zip(listed.rows, table["score"].to_pylist(), table["problem"].to_pylist(), strict=True))
    if bad := [(row.name, problem) for row, _, problem in rows if problem is not None]:
        line = f"{len(bad)} of {len(rows)} reference images are left out, the first: {bad[0][0]}: {bad[0][1]}"
        print(printable(line), file=sys.stderr)
    scores = torch.tensor([score for _, score, _ in rows if score is not None])
    different = len({row.path for row, score, _ in rows if score is not None})
    if different < FEW:
        thin = f"reference.images: {different} different images in {len(scores)} rows"
        print(f"{thin}; z_score and quantile are rough below {FEW}", file=sys.stderr)
    name = reference.name or Path(reference.images).name
    return Calibration.fit(scores, name, model.noise, reference.seed, model.head.axis_weights)


def calibration_text(calibration: Calibration | None) -> str:
    """Describe a calibration in one line."""
    if calibration is None:
        return "not calibrated"
    spread = f"{calibration.mean:.4g} ± {calibration.std:.4g}"
    return f"calibrated at {calibration.noise} on {calibration.number} images of {calibration.reference}: {spread}"


run = partial(run_function, publish, bare=2, classes=False)
