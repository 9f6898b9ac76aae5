"""``latentreward plan-keep``: find how many candidates to keep after which steps, for a generator and its rewards."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from latentreward.alignment import PolicySource, RewardSource, Sampling, check_sigmas
from latentreward.apps.generation import image_folder
from latentreward.apps.generation.keep_plan import Planned, Pool, draw_frontier, frontier
from latentreward.apps.generation.search import Sampler, Search
from latentreward.apps.generation.trained_policy import TrainedPolicy, offload_text_encoders
from latentreward.core.contracts import PathText, PromptBatch, like_prompt
from latentreward.core.errors import InputError, check_range
from latentreward.core.reports.tables import Table, as_text, with_interval
from latentreward.core.running import find_device
from latentreward.core.settings.functions import run_function
from latentreward.data.alignment.prompt_files import read_prompt_rows

LEAST_PROMPTS = 8
"""Fewest prompts: half choose the schedules, and the others tell what these gain."""


def plan_keep(
    prompts: PathText,
    reward: RewardSource,
    policy: PolicySource | None = None,
    checkpoint: Path | None = None,
    lora: Path | None = None,
    look_ahead: RewardSource | None = None,
    sampling: Sampling = image_folder.DETERMINISTIC,
    guidance_scale: float | None = None,
    candidates: int = 16,
    num_prompts: int = 24,
    after: Sequence[int] | None = None,
    budget: float = 2.0,
    score_sigmas: Sequence[float] = (0.2,),
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    picture: Path = Path("keep.png"),
) -> None:
    """Record whole trajectories of some prompts, replay schedules on them, and print the best for each time.

    A schedule is judged by ``reward`` on prompts that it was not chosen on. The last line is for ``generate``.

    Args:
        prompts: File of prompts, as ``latentreward generate`` takes it.
        reward: Reward that scores finished pictures.
        policy: Generator; by default the one recorded in the checkpoint.
        checkpoint: Checkpoint of an alignment run, whose adapter is loaded.
        lora: LoRA file or folder to load.
        look_ahead: Latent reward that scores noisy states, best one that looks ahead; by default ``reward``.
        sampling: Steps, noise and size, as ``generate`` will have them.
        guidance_scale: Guidance scale, as ``generate`` will have it.
        candidates: Candidates of each prompt; schedules begin with as many, or fewer.
        num_prompts: Number of prompts to take from the start of the file.
        after: Numbers of finished steps after which candidates may be dropped, where 0 is the noise; by default 0, 1, 2
            and a fifth, two and three fifths of the steps.
        budget: Time that a picture may take, in that of one sample.
        score_sigmas: Noise levels in [0, 1] at which a latent reward scores finished pictures.
        seed: Seed of all random numbers.
        batch_size: Samples in one forward pass; by default as many as fit the device, 64 at most.
        device: ``cpu``, ``cuda``, ...; ``auto`` takes a GPU if there is one.
        picture: Where the picture of scores against time is written.
    """
    trained = TrainedPolicy(policy, checkpoint, lora)
    family = (source := trained.source()).resolve_family()
    scale, steps = family.guidance(guidance_scale), sampling.num_inference_steps
    sampling.require_own_noise(family)
    check_sigmas(score_sigmas, "score_sigmas")
    check_range("[2, inf)", "one leaves nothing to choose from", candidates=candidates)
    check_range("[1, inf)", "in samples", budget=budget)
    usual = {0, 1, 2, steps // 5, 2 * steps // 5, 3 * steps // 5} & {*range(steps)}
    after = sorted(usual if after is None else {*after})
    if not after:
        raise InputError("after=[] leaves no step to choose after; leave it out for the usual ones")
    search = Search(reward, candidates, dict.fromkeys(after, candidates), look_ahead, None, None, score_sigmas)
    search.check(source, sampling)
    texts = [row.prompt for row in read_prompt_rows(prompts, "prompts")][:num_prompts]
    family.check_prompts(texts, "prompts")
    if len(texts) < LEAST_PROMPTS:
        raise InputError(f"prompts: {len(texts)} are too few to choose by; give at least {LEAST_PROMPTS}")
    target = find_device(device)
    generator = trained.load(target, sampling)
    rows = batch_size or image_folder.fitting_batch(sampling.latent_shape(family), target)
    sampler = Sampler(generator, sampling, scale, seed, rows)
    rewards, _ = search.load(sampler, like_prompt("", texts[0]))
    offload_text_encoders(generator, rewards, texts, target)
    batch = PromptBatch(tuple(texts), tuple(map(str, range(len(texts)))))
    pool = Pool.record(sampler, rewards, batch, candidates, after, score_sigmas)
    found = frontier(pool)
    draw_frontier(found, picture)
    print(as_text(table(found)))
    print(f"{picture}: scores against time; scores are the reward's own, on {len(texts) // 2} prompts of {len(texts)}")
    taken = max((one for one in found if one.chosen and one.samples <= budget), key=lambda one: one.samples)
    keep = "".join(f" --keep '{dict(taken.schedule.keep)}'" * bool(taken.schedule.keep))
    print(f"in the time of {budget:g} samples: --best_of {taken.schedule.candidates}{keep}")


def table(found: Sequence[Planned]) -> Table:
    """Return the table of schedules, by their time."""
    columns = ("best_of", "keep", "time in samples", "score [95 %]", "above best of N in equal time [95 %]")
    shown = [
        (
            str(one.schedule.candidates),
            str(dict(one.schedule.keep)) if one.schedule.keep else "",
            f"{one.samples:.2f}",
            with_interval(one.score, lambda value: f"{value:.3f}"),
            with_interval(one.gain, lambda value: f"{value:+.3f}") if one.schedule.keep else "",
        )
        for one in sorted(found, key=lambda one: one.samples)
    ]
    return Table(columns, tuple(shown))


run = partial(run_function, plan_keep, bare=1)
