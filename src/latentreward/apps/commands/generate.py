"""``latentreward generate``: sample pictures of prompts, optionally chosen by a reward (best of N, searches)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from latentreward.apps.generation import Candidates, Population, best_of_n, search_latents, search_population
from latentreward.apps.generation.image_folder import (
    DETERMINISTIC,
    ImageFolder,
    Row,
    decode_latents,
    make_pictures,
    write_batch,
)
from latentreward.apps.generation.trained_policy import TrainedPolicy, offload_text_encoders, plain
from latentreward.contracts import PathText, PromptBatch
from latentreward.data.alignment.prompt_files import read_prompt_rows
from latentreward.errors import InputError
from latentreward.interrupts import interrupts_told
from latentreward.policies import Policy, PolicySource
from latentreward.ranks.settings import TrainerSettings
from latentreward.ranks.shared_work import SHARDS, SharedWork
from latentreward.rewards import Reward, RewardSource
from latentreward.rollout import RewardGuidance, Sampling, sample_guided, sample_latents
from latentreward.settings.functions import run_function
from latentreward.storage.locks import locked

PICTURES = "pictures"
"""Name of the task of the processes."""


def generate(
    prompts: PathText,
    output_dir: Path,
    policy: PolicySource | None = None,
    checkpoint: Path | None = None,
    lora: Path | None = None,
    reward: RewardSource | None = None,
    sampling: Sampling = DETERMINISTIC,
    guidance_scale: float | None = None,
    images_per_prompt: int = 1,
    best_of: int = 1,
    step_search: Candidates | None = None,
    population_search: Population | None = None,
    reward_guidance: RewardGuidance | None = None,
    score_sigmas: Sequence[float] = (0.2,),
    seed: int = 0,
    batch_size: int = 8,
    max_prompt_chars: int = 10_000,
    table: Literal["csv", "jsonl"] = "csv",
    device: str = "auto",
    trainer: TrainerSettings | None = None,
) -> None:
    """Write pictures or clips of each prompt, a grid of all pictures, and a table with their seeds and scores.

    The same command resumes a stopped run; existing pictures are kept. A picture depends only on its prompt, the
    prompt's position in the file, the number of the picture, the seed and the settings.

    Args:
        prompts: Text file with a prompt per line; or .json, .jsonl, .csv, .tsv, .parquet with a column ``prompt``. A
            prompt that is repeated gets as many pictures.
        output_dir: Folder for pictures, ``grid.png`` and ``images.csv``.
        policy: Generator; by default the one recorded in the checkpoint.
        checkpoint: Checkpoint of an alignment run, whose adapter is loaded.
        lora: LoRA file or folder to load, as ``latentreward export`` writes it.
        reward: Reward that scores the pictures, and by which best_of and the searches choose and guidance moves.
        sampling: Steps, noise, size and number of frames; clips become animated WebP files. Step search needs noise:
            ``eta`` (SD1.5, SD2.1, SDXL) or ``noise_level`` (SD3).
        guidance_scale: Guidance scale as the pipeline of the generator's family takes it; by default the family's own:
            5 for SD and SD3, where 1 switches guidance off.
        images_per_prompt: Pictures to write for each prompt.
        best_of: Number of samples per picture; the sample with the highest score is written.
        step_search: Number of candidates at each sampling step and the steps to search at; the candidate with the
            highest score is kept.
        population_search: Starts near one, of which a latent reward keeps the better ones after some steps, and in the
            end one. ``batch_size`` times ``size`` states are sampled at once.
        reward_guidance: Move each step of a window along the gradient of a latent reward. Needs noise, as step search.
        score_sigmas: Noise levels in [0, 1] at which a latent reward scores finished pictures; several levels make an
            ensemble. Pixel rewards ignore this setting.
        seed: Seed of all random numbers.
        batch_size: Pictures sampled at once.
        max_prompt_chars: Most characters of a prompt; longer ones are refused. Text encoders read a few hundred.
        table: Format of the table.
        device: ``cpu``, ``cuda``, ...; ``auto`` takes a GPU if there is one.
        trainer: Settings of several processes that share the work, on many GPUs or machines; by default one process.

    Raises:
        InputError: If a setting is wrong, or ``output_dir`` holds other files or pictures made with other settings.
    """
    trained = TrainedPolicy(policy, checkpoint, lora)
    source = trained.source()
    family = source.resolve_family()
    guidance_scale = family.guidance(guidance_scale)
    searches = {
        "step_search": step_search,
        "population_search": population_search,
        "reward_guidance": reward_guidance,
    }
    settings = trained.identity() | plain(
        {
            "reward": reward,
            "sampling": sampling,
            "guidance_scale": guidance_scale,
            "best_of": best_of,
            "score_sigmas": list(score_sigmas),
            "seed": seed,
            **searches,
        }
    )
    texts = [row.prompt for row in read_prompt_rows(prompts, "prompts", max_prompt_chars)]
    _check_searches(searches, reward, best_of)
    if step_search is not None:
        step_search.branching().steps(sampling.sampler(family))
    if population_search is not None:
        population_search.check(sampling)
    if reward_guidance is not None:
        reward_guidance.check(sampling.sampler(family))
    if reward is not None:
        reward.require_latents_of(source)
        _check_reward(reward, population_search, reward_guidance)

    def pictures(batches: Sequence[list[list[Any]]]) -> Callable[[list[list[Any]]], list[Row]]:
        """Load generator and reward; return the function that makes a batch of pictures."""
        generator = trained.load(work.device)
        scorer = None if reward is None else reward.load(generator).eval().to(work.device)
        if scorer is not None:
            _try(scorer, generator, sampling, best_of, score_sigmas)
        shown = [prompt for batch in batches for _, _, prompt in batch]
        offload_text_encoders(generator, scorer, shown, work.device)
        how: dict[str, Any] = {"sampling": sampling, "guidance_scale": guidance_scale, "seed": seed}
        sample: Callable[[PromptBatch], Tensor] = partial(sample_latents, generator, **how)
        if step_search is not None and scorer is not None:
            sample = partial(search_latents, generator, scorer, candidates=step_search, **how)
        if population_search is not None and scorer is not None:
            sample = partial(search_population, generator, scorer, population=population_search, **how)
        if reward_guidance is not None and scorer is not None:
            sample = partial(sample_guided, generator, scorer, guidance=reward_guidance, **how)
        draw = partial(_draw, sample, scorer, best_of, seed, score_sigmas)
        return partial(write_batch, output_dir, draw, partial(decode_latents, generator), seed)

    with SharedWork(trainer, device, output_dir / SHARDS) as work:
        work.join({PICTURES: pictures}, {**settings, "batch_size": batch_size})
        if not work.first:
            work.serve()
            return
        with locked(output_dir, "output_dir"):
            folder = ImageFolder(output_dir, settings, table, work.left_over(PICTURES))
            wanted = [(place, image) for place in range(len(texts)) for image in range(images_per_prompt)]
            missing = len(folder.missing(wanted, texts))
            print(f"{len(wanted) - missing} of {len(wanted)} pictures are there already", flush=True)
            with interrupts_told(
                lambda: f"{len(folder.rows)} pictures are kept in {output_dir}: the same command goes on there"
            ):
                make_pictures(work, PICTURES, folder, wanted, texts, batch_size)
            folder.write_grid(wanted)
            print(folder.summary(wanted))


def _check_searches(searches: Mapping[str, Any], reward: RewardSource | None, best_of: int) -> None:
    """Check that at most one search is set, and that a reward is set if pictures are chosen."""
    named = [name for name, value in searches.items() if value is not None]
    if reward is None and (best_of > 1 or named):
        raise InputError(f"{', '.join(named) or 'best_of'}: needs a reward to choose by; set reward")
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} are both set; leave one out")


def _check_reward(
    reward: RewardSource, population_search: Population | None, reward_guidance: RewardGuidance | None
) -> None:
    """Check, before anything is loaded, that pictures can be chosen by the reward, and do not depend on each other."""
    if reward.remembers():
        raise InputError(
            "reward: a RewardMixture with normalise: running scores by all that it has seen, so a command that goes on "
            "would make other pictures; set normalise: group or none"
        )
    if population_search is not None:
        reward.require_step_scores("population_search")
    if reward_guidance is not None:
        if reward_guidance.normalise:
            raise InputError(
                "reward_guidance.normalise divides by the norm over a batch, so pictures would depend on each other; "
                "leave it out"
            )
        reward.require_guidance()


def _draw(
    sample: Callable[[PromptBatch], Tensor],
    reward: Reward | None,
    best_of: int,
    seed: int,
    sigmas: Sequence[float],
    prompts: PromptBatch,
) -> tuple[Tensor, Tensor | None]:
    """Sample finished latents ``(B, C, ...)``; with a reward, also return the scores ``(N, B)`` of all N samples."""
    if reward is None:
        return sample(prompts), None
    best = best_of_n(sample, reward, prompts, best_of, seed=seed, sigmas=sigmas)
    return best.latents, best.scores


def _try(reward: Reward, policy: Policy, sampling: Sampling, best_of: int, sigmas: Sequence[float]) -> None:
    """Score random latents with the settings of the run, so that an unfit reward fails before anything is sampled."""
    device = next(policy.network.parameters()).device
    noise = torch.randn(
        best_of, 1, *sampling.latent_shape(policy.family), generator=torch.Generator().manual_seed(0)
    ).to(device)
    drawn = iter(noise)
    best_of_n(lambda prompts: next(drawn), reward, PromptBatch(("",), ("",)), best_of, sigmas=sigmas)


run = partial(run_function, generate, bare=2)
