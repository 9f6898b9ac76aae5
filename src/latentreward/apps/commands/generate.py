"""``latentreward generate``: sample pictures of prompts, optionally chosen by a reward (best of N, searches)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from latentreward.alignment import PolicySource, RewardGuidance, RewardSource, Sampling, check_sigmas
from latentreward.apps.generation import image_folder
from latentreward.apps.generation.search import Candidates, Sampler, Search
from latentreward.apps.generation.trained_policy import TrainedPolicy, files_named, offload_text_encoders, plain
from latentreward.core.contracts import PathText, like_prompt, sources_of
from latentreward.core.interrupts import interrupts_told
from latentreward.core.settings.functions import run_function
from latentreward.core.storage.durable import locked
from latentreward.core.workers import SharedWork
from latentreward.data.alignment.prompt_files import read_prompt_rows
from latentreward.diffusion import Family

PICTURES = "pictures"
"""Name of the task of the processes."""


def generate(
    prompts: PathText,
    output_dir: Path,
    policy: PolicySource | None = None,
    checkpoint: Path | None = None,
    lora: Path | None = None,
    reward: RewardSource | None = None,
    sampling: Sampling = image_folder.DETERMINISTIC,
    guidance_scale: float | None = None,
    images_per_prompt: int = 1,
    best_of: int = 1,
    keep: dict[int, int] | None = None,
    look_ahead: RewardSource | None = None,
    step_search: Candidates | None = None,
    reward_guidance: RewardGuidance | None = None,
    score_sigmas: Sequence[float] = (0.2,),
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    workers: int = 1,
    gpus_per_worker: float | None = None,
) -> None:
    """Write pictures or clips of each prompt, a grid of all pictures, and a table with their seeds, noises and scores.

    The same command resumes a stopped run; existing pictures are kept. A picture depends only on its prompt, the
    prompt's position in the file, the number of the picture, the seed and the settings.

    Args:
        prompts: Text file with a prompt per line; or .json, .jsonl, .csv, .tsv, .parquet with a column ``prompt``. A
            prompt that is repeated gets as many pictures. For an editor also with a column ``source_images``, the
            pictures that are edited.
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
        keep: How many of the best_of candidates are sampled on, by the number of finished steps: ``{0: 6, 8: 2}`` goes
            on with the 6 best noises, and after 8 steps with 2. ``latentreward plan-keep`` proposes it.
        look_ahead: Latent reward that scores noisy states for ``keep``, such as one that
            :class:`~latentreward.alignment.LookAheadModule` has trained; by default ``reward``.
        step_search: Number of candidates at each sampling step and the steps to search at; the candidate with the
            highest score is kept.
        reward_guidance: Move each step of a window along the gradient of a latent reward. Needs noise, as step search.
        score_sigmas: Noise levels in [0, 1] at which a latent reward scores finished pictures; several levels make an
            ensemble. Pixel rewards ignore this setting.
        seed: Seed of all random numbers.
        batch_size: Samples in one forward pass; by default as many as fit the device, 64 at most.
        device: ``cpu``, ``cuda``, ...; ``auto`` takes a GPU if there is one.
        workers: Processes that sample: on this machine, or on the Ray cluster of RAY_ADDRESS. More than 1 need the
            extra ``cluster``.
        gpus_per_worker: GPUs of each of several workers, e.g. 0.5; by default 1 if there are any.
    """
    command = partial(generate, **locals())
    trained = TrainedPolicy(policy, checkpoint, lora)
    family = (source := trained.source()).resolve_family()
    guidance_scale = family.guidance(guidance_scale)
    sampling.require_own_noise(family)
    chosen: dict[str, Any] = (
        {"keep": keep, "look_ahead": look_ahead} if keep else {}
    )  # else folders of before could not go on
    chosen |= {"best_of": best_of, "step_search": step_search, "reward_guidance": reward_guidance}
    made_by = {"reward": reward, "sampling": sampling, "guidance_scale": guidance_scale, **chosen}
    settings = trained.identity() | plain({**made_by, "score_sigmas": list(score_sigmas), "seed": seed})
    check_sigmas(score_sigmas, "score_sigmas")
    search = Search(reward, best_of, keep or {}, look_ahead, step_search, reward_guidance, score_sigmas)
    search.check(source, sampling)
    texts = [row.prompt for row in read_prompt_rows(prompts, "prompts")]
    family.check_prompts(texts, "prompts")

    def pictures(shown: Sequence[str]) -> Callable[[list[list[Any]]], Iterator[list[image_folder.Made]]]:
        """Load generator and rewards; return the function that makes a batch of pictures."""
        generator = trained.load(work.device, sampling)
        sampler = Sampler(generator, sampling, guidance_scale, seed, rows)
        rewards, draw = search.load(sampler, like_prompt("", texts[0]))
        offload_text_encoders(generator, rewards, shown, work.device)
        followed = not (step_search or reward_guidance) and sampling.follows_flow(family, guidance_scale)
        decode = partial(image_folder.decode_latents, generator)
        return partial(image_folder.draw_batch, draw, decode, seed, with_noise=followed)

    with SharedWork(command, workers, device, gpus_per_worker) as work:
        files = files_named([settings, str(prompts)]) if workers > 1 else {}
        rows = batch_size or image_folder.fitting_batch(sampling.latent_shape(family), work.device)
        more = {"batch_size": rows, "checkpoint": None, "lora": None, "files": files}
        work.join({PICTURES: pictures}, settings | more)
        with locked(output_dir, "output_dir"):
            folder = image_folder.ImageFolder(output_dir, settings)
            wanted = [(place, image) for place in range(len(texts)) for image in range(images_per_prompt)]
            there = len(wanted) - len(folder.missing(wanted, texts))
            print(f"{there} of {len(wanted)} pictures are there already; {told(sampling, family, texts)}", flush=True)
            with interrupts_told(
                lambda: f"{len(folder.rows)} pictures are kept in {output_dir}: the same command goes on there"
            ):
                image_folder.make_pictures(work, PICTURES, folder, wanted, texts, rows)
            folder.write_grid(wanted)
            print(folder.summary(wanted))


def told(sampling: Sampling, family: Family, texts: Sequence[str]) -> str:
    """Return size and steps of pictures, and of an editor how many pictures each prompt edits."""
    height, width = sampling.height or family.native_size[0], sampling.width or family.native_size[1]
    frames = f"{sampling.frames} frames of " * (sampling.frames != 1)
    edits = f"; each prompt edits {len(sources_of(texts[0]))} pictures" * (family.sources[1] != 0)
    return f"{frames}{height} × {width} pixels in {sampling.num_inference_steps} steps{edits}"


run = partial(run_function, generate, bare=2)
