"""``latentreward taste``: train a reward on pictures of one's own, and align a generator with it."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from latentreward.apps.taste.steps import Step
from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, check_at_least_one, check_multiples, check_range, errors_at, tell
from latentreward.core.interrupts import interrupts_told
from latentreward.core.settings.functions import run_function
from latentreward.core.storage.durable import locked

if TYPE_CHECKING:
    from latentreward.apps.taste.plan import Plan
    from latentreward.diffusion.backbones.tuning import Tuning

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def taste(
    folder: Path,
    *,
    rate: bool = False,
    align: bool = False,
    columns: dict[str, str] | None = None,
    labels: dict[str, str | float] | None = None,
    base: PathText = SD15,
    tuning: Literal["auto", "frozen", "lora", "full"] = "auto",
    pairs: int = 500,
    size: int | None = None,
    epochs: int = 40,
    prompts: Path | None = None,
    align_always: bool = False,
    guidance_scale: float | None = None,
    num_prompts: int = 24,
    train_settings: list[str] = [],  # noqa: B006
    align_settings: list[str] = [],  # noqa: B006
    device: Literal["auto", "cpu", "gpu"] = "auto",
    seed: int = 0,
    port: int = 7861,
    work: Path | None = None,
) -> None:
    """Train a reward on pairs of your own pictures, say how far it can be trusted, and align with it.

    Some 500 pairs are needed before the accuracy is told from guessing, fewer if they differ clearly; 20 are the least.

    FOLDER holds pictures in ``chosen/`` and ``rejected/``, or a file ``ratings.jsonl``, which --rate writes: a page on
    this machine that shows two pictures at a time. A text file beside a picture, of the same name, is its caption. Or
    it is a table of pairs (CSV, TSV, JSON) with prompts. The steps are: a split without common pictures, latents, the
    reward with early stopping, the accuracy on held-out pairs, with --align the alignment and pictures before and
    after, and a page. The same command goes on after any stop.

    Examples: ``latentreward taste pictures --rate``, then ``latentreward taste pictures --base /models/sd15``;
    ``latentreward taste pictures --base sd_tiny`` to try all of it on a CPU without any download.

    Args:
        folder: Folder of pictures, where --rate alone writes: ``ratings.jsonl`` and a hidden lock file. Or a table.
        rate: Whether to serve the page to rate pictures, until Ctrl-C; answers are kept at once, and continued.
        align: Whether to align the base with the reward, if the reward has learned something.
        columns: Columns of a table where they have other names, e.g. ``{prompt: text, image_a: left, image_b: right}``.
        labels: Meaning of each label of a table, e.g. ``{left: a, right: b, tie: tie}``.
        base: Pipeline that the reward reads and that is aligned: a folder or hub id of SD1.5, SDXL or SD3.5, or
            ``sd_tiny``, ``sd35_tiny``.
        tuning: Weights that train besides the head: ``frozen`` (none), ``lora`` (adapters) or ``full`` (all); ``auto``
            takes frozen below 300 training pairs, else lora.
        pairs: Most pairs; of more, so many are drawn.
        size: Side in pixels to which pictures are cropped and resized; that of the base by default.
        epochs: Most passes over the training pairs.
        prompts: File of prompts for the alignment and its pictures; by default the captions of the pictures.
        align_always: Whether to align even if the reward may be no better than a coin.
        guidance_scale: Guidance scale of the alignment and its pictures; that of the base by default.
        num_prompts: Most prompts with pictures before and after.
        train_settings: Further settings of the reward's training, as ``latentreward fit`` takes them, such as
            ``[--model.optimizer.lr=1e-4, --data.batch_size=4]``.
        align_settings: Further settings of the alignment, such as ``[--trainer.max_steps=200]``.
        device: Device of all steps; ``auto`` takes a GPU if there is one.
        seed: Seed of the split, of drawn pairs, of the trainings and of the pictures.
        port: Port of the page to rate; 0 takes a free one and prints it.
        work: Folder of all outputs, outside the folder of pictures; ``runs/taste/`` and the name of the folder by
            default.
    """
    check_at_least_one(pairs=pairs, epochs=epochs, num_prompts=num_prompts, size=size)
    folder = folder.resolve()  # the name of `.` is empty
    if rate:
        rate_pictures(folder, port, seed)
        return
    output = (Path("runs/taste", folder.name) if work is None else work).resolve()
    if output.is_relative_to(folder):  # pictures drawn there would be found as pictures to rate
        raise InputError(f"work: {output} lies in the folder of pictures; give --work a folder outside {folder}")
    import torch

    from latentreward.apps.taste import plan as plans
    from latentreward.apps.taste.pairs import LEAST, collect
    from latentreward.apps.taste.splitting import TRAIN, split
    from latentreward.core.running import find_device

    check_range(f"[{LEAST}, inf)", "fewer are not split", pairs=pairs)
    if device == "gpu":
        find_device("cuda")
    found = collect(folder, columns, labels)
    known = plans.find_base(base)
    own = plans.family_of(base)
    print(found.how)
    for remark in found.remarks:
        tell(remark)
    parts = split(found, pairs, seed)
    counts = {name: len(some) for name, some in parts.parts.items()}
    print(f"split {parts.how}: {', '.join(f'{number} {name}' for name, number in counts.items())}", flush=True)
    told = plans.prompts_of(parts, prompts, own) if align else None
    if size is not None:
        check_multiples("size", [size], own.side_multiple)
        with errors_at("size: "):
            own.latent_shape(size, size)  # some networks have positions for so many pixels only
    chosen: Tuning = ("frozen" if counts[TRAIN] < plans.FROZEN_BELOW else "lora") if tuning == "auto" else tuning
    with locked(output, "work"), interrupts_told(lambda: f"what is done is kept in {output}: the same command goes on"):
        prompt_folder = None
        if told is not None:
            prompt_folder, line = plans.write_prompts(output, told, seed)
            print(line)
        plan = plans.Plan(
            base=base,
            folder=folder if folder.is_dir() else folder.parent,
            pairs=plans.write_pairs(output, parts),
            prompts=prompt_folder,
            tuning=chosen,
            size=size,
            gpu=device == "gpu" or (device == "auto" and torch.cuda.is_available()),
            guidance=guidance_scale,
            train=[f"--trainer.max_epochs={epochs}", *train_settings],
            align=align_settings,
            pictures=num_prompts,
        )
        print(
            f"base {base} of {size or known.size} pixels a side, tuning {chosen}, {'GPU' if plan.gpu else 'CPU'}",
            flush=True,
        )
        run_steps(plan.steps(output, seed), plan, output, parts.how, always=align_always)


def rate_pictures(folder: Path, port: int, seed: int) -> None:
    """Serve the page to rate pictures until Ctrl-C or SIGTERM, after which the same command continues."""
    from latentreward.apps.serving.settings import bind
    from latentreward.apps.taste.pairs import check_folder
    from latentreward.apps.taste.rating_page import HOST, serve_ratings
    from latentreward.apps.taste.ratings import Ratings

    check_folder(folder)  # the lock would create it
    with bind(HOST, port) as bound, locked(folder, "folder"):
        ratings = Ratings(folder, seed)
        for remark in ratings.remarks:
            tell(remark)
        kept = f"ratings are kept in {ratings.file}: the same command goes on"
        with interrupts_told(lambda: kept):
            serve_ratings(ratings, bound)


def run_steps(steps: Mapping[str, Step], plan: "Plan", output: Path, how: str, always: bool) -> None:
    """Run the steps that have not finished, print the accuracy, and write the page."""
    from latentreward.apps.taste.plan import ALIGN, BEST, CACHE, PICTURES, REWARD, SCORES
    from latentreward.apps.taste.results import measure, write_result

    for name in (CACHE, REWARD, SCORES):
        steps[name].run()
    measured = measure(steps[SCORES].output, plan.pairs)
    print(f"{measured.line()}\n{measured.verdict()}", flush=True)
    aligns = ALIGN in steps and (measured.learned or always)
    if aligns:
        steps[ALIGN].run()
        steps[PICTURES].run()
    elif ALIGN in steps:
        print("align: left out, since the reward may be no better than a coin; --align_always true aligns anyway")
    page = write_result(output, plan, measured, how, steps[PICTURES].output if aligns else None)
    print(f"reward: {(reward := steps[REWARD].output / BEST)}")
    if measured.learned:
        print(
            f"pick seeds by it: latentreward generate PROMPTS PICTURES --policy.source {plan.base} --best_of 4 "
            f"--keep '{{1: 2, 12: 1}}' --reward LatentReward --reward.path {reward}"
        )
    if aligns:
        print(f"adapter: {steps[ALIGN].output / 'lora'}")
    print(f"page: {page}")


run = partial(run_function, taste, classes=False)
