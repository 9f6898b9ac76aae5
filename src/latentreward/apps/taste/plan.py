"""Settings by base and by number of pairs, the commands of the steps, and the files that the steps read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentreward.apps.taste.pairs import lines, number_of
from latentreward.apps.taste.splitting import HELD_OUT, STOP, TRAIN, Split
from latentreward.apps.taste.steps import Step
from latentreward.core.errors import InputError, errors_at
from latentreward.core.storage.digests import digest
from latentreward.core.storage.durable import write_file
from latentreward.data.alignment.prompt_files import read_prompts
from latentreward.diffusion import Family, find_family
from latentreward.diffusion.backbones.loading import SHIPPED, PipelineSource
from latentreward.diffusion.backbones.tuning import Tuning

CACHE, REWARD, SCORES, ALIGN, PICTURES = "cache", "train", "scores", "align", "pictures"
FROZEN_BELOW = 300  # training pairs below which only the head trains; above, adapters train too
BEST = "checkpoints/best.ckpt"
PREFERENCES, PROMPTS, JUDGED = "pairs.jsonl", "prompts.jsonl", "judged.jsonl"
"""Files of a collection: its pairs, the prompts of the alignment, and those of the pictures before and after."""
ENOUGH = 16  # prompts from which a quarter is kept for the pictures; of fewer, the same serve for both
ALIGNMENT = ("--model.optimizer.lr=6e-5", "--trainer.max_steps=100")


@dataclass(frozen=True)
class Base:
    """Generator whose network the reward reads, and which is aligned."""

    backbone: str  # name of the backbone
    size: int  # native side of an image in pixels
    guidance: float  # guidance scale of alignment and pictures
    tiny: bool = False  # whether it is a shipped pipeline, whose few weights need larger learning rates
    # Rate and length of the alignment, and its batches where they are not those of configs/taste/align.yaml
    alignment: Sequence[str] = ALIGNMENT


RATES: Mapping[Tuning, float] = {"frozen": 3e-4, "lora": 1e-4, "full": 1e-5}
TINY_RATES: Mapping[Tuning, float] = {"frozen": 1e-3, "lora": 1e-3, "full": 5e-4}
"""Learning rates of the reward by tuning, of a full base and of a shipped one."""
TINY_ALIGNMENT = (
    *("--model.optimizer.lr=1e-3", "--trainer.max_steps=24"),
    *("--data.batch_size=64", "--data.prompts_per_rollout=32"),
)
TINY_BASES = {name: Base(name, 32, 1.0, True, TINY_ALIGNMENT) for name in SHIPPED}
BASES = {
    "StableDiffusionPipeline": Base("sd15", 512, 5.0),
    "StableDiffusionXLPipeline": Base("sdxl", 1024, 5.0),
    "StableDiffusion3Pipeline": Base("sd35_medium", 1024, 4.5),
}
"""Class of a pipeline in diffusers → base; the LPO recipes' guidance for SD1.5 and SDXL, the pipeline's for SD3.5."""


def find_base(source: str) -> Base:
    """Return the settings for a pipeline: a folder, hub id, ``sd_tiny`` or ``sd35_tiny``."""
    if source in TINY_BASES:
        return TINY_BASES[source]
    with errors_at("base: "):
        kind = str(PipelineSource(source).index.get("_class_name"))
    if kind not in BASES:
        raise InputError(
            f"base: {source!r} is a {kind}; taste takes {', '.join([*BASES, *TINY_BASES])}; for others see "
            "docs/data.md, which does the same by hand"
        )
    return BASES[kind]


def family_of(base: str) -> Family:
    """Return the family of a base, of which only configs are read; raise InputError if they do not fit together."""
    with errors_at("base: "):
        return find_family(PipelineSource(base))


@dataclass(frozen=True)
class Plan:
    """Settings of the steps."""

    base: str  # source of the pipeline
    folder: Path  # folder of the pictures
    pairs: Path  # folder of PREFERENCES
    prompts: Path | None  # folder of PROMPTS and JUDGED; None without an alignment
    tuning: Tuning  # weights of the network that train
    size: int | None  # side of an image in pixels
    gpu: bool  # whether the steps run on a GPU
    guidance: float | None  # guidance scale of alignment and pictures; None takes the base's
    train: Sequence[str]  # arguments of the reward's training, after those of this module
    align: Sequence[str]  # arguments of the alignment, after those of this module
    pictures: int  # most prompts with pictures before and after

    def steps(self, work: Path, seed: int) -> dict[str, Step]:
        """Return all steps by name, in their order; without prompts, those of the reward."""
        found, steps, places = find_base(self.base), dict[str, Step](), {"seed": str(seed)}
        commands = {CACHE: self._cache(found), REWARD: self._train(found), SCORES: self._scores()}
        if self.prompts is not None:
            scale = f"guidance_scale={found.guidance if self.guidance is None else self.guidance}"
            commands[ALIGN] = self._align(found, self.prompts, scale)
            commands[PICTURES] = self._pictures(self.prompts, scale)
        for name, arguments in commands.items():
            filled = "\0".join(arguments)
            for place, value in places.items():  # seed, and outputs of the steps before
                filled = filled.replace(f"{{{place}}}", value)
            steps[name] = Step.of(work, name, filled.split("\0"))
            places[name] = str(steps[name].output)
        return steps

    def _fit(self) -> list[str]:
        """Return the arguments of both trainings."""
        return [
            *("--trainer.default_root_dir={out}", "--seed_everything={seed}", "--ckpt_path=last"),
            *(["--trainer.accelerator=gpu", "--trainer.precision=bf16-mixed"] if self.gpu else []),
            *([] if self.gpu else ["--trainer.accelerator=cpu"]),
        ]

    def _sides(self, name: str) -> list[str]:
        return [] if self.size is None else [f"--{name}.{side}={self.size}" for side in ("height", "width")]

    def _cache(self, found: Base) -> list[str]:
        return [
            *("cache", "{out}", "--config=configs/taste/cache.yaml"),
            *(f"--reader.file={self.pairs / PREFERENCES}", f"--reader.root={self.folder}"),
            *(f"--encoder.source={self.base}", f"--images.size={self.size or found.size}", "--seed={seed}"),
            *(["--dtype=float32"] if found.tiny else []),
            f"--device={'cuda' if self.gpu else 'cpu'}",
        ]

    def _train(self, found: Base) -> list[str]:
        backbone = [f"--model.backbone={found.backbone}", "--model.backbone.text_taps=[]"]
        backbone += [] if found.tiny else [f"--model.backbone.source={self.base}"]
        backbone += [f"--model.backbone.tuning={self.tuning}", "--model.backbone.text_encoder_tuning=frozen"]
        backbone += ["--model.backbone.lora={rank: 8, alpha: 8}"] if self.tuning == "lora" else []
        backbone += ["--model.backbone.frozen_dtype=bfloat16"] if self.gpu and self.tuning != "full" else []
        return [
            *("fit", "--config=configs/taste/reward.yaml", *backbone),
            *("--data.train.cache={cache}", f"--data.train.split={TRAIN}"),
            *("--data.val.cache={cache}", f"--data.val.split={STOP}"),
            f"--model.optimizer.lr={(TINY_RATES if found.tiny else RATES)[self.tuning]}",
            "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
            # The middle one of the three levels of configs/taste/reward.yaml, by which the best weights are chosen too.
            *("--trainer.callbacks.monitor=val/loss_sigma0.3", "--trainer.callbacks.patience=10"),
            *(*self._fit(), *self.train),
        ]

    def _scores(self) -> list[str]:
        return [
            *("predict", "--config={train}/config.yaml", f"--ckpt_path={{train}}/{BEST}"),
            *("--data.predict.cache={cache}", f"--data.predict.split={HELD_OUT}"),
            *("--predictions.output_dir={out}", "--predictions.overwrite=true"),
            *("--trainer.default_root_dir={out}", "--trainer.logger=false"),
            # Each process would write a file of its own, and the training may have had many.
            *("--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"),
        ]

    def _align(self, found: Base, prompts: Path, scale: str) -> list[str]:
        return [
            *("fit", "--config=configs/taste/align.yaml", f"--model.policy.source={self.base}"),
            *(f"--model.reward.path={{train}}/{BEST}", *self._sides("model.sampling"), f"--model.{scale}"),
            *(["--model.policy.frozen_dtype=bfloat16"] if self.gpu else []),
            *(f"--data.prompts={prompts / PROMPTS}", *found.alignment, *self._fit(), *self.align),
        ]

    def _pictures(self, prompts: Path, scale: str) -> list[str]:
        return [
            *("evaluate-policy", "{out}", f"--prompts={prompts / JUDGED}", f"--num_prompts={self.pictures}"),
            *(f"--policy.pipeline={self.base}", "--policy.name=after", "--policy.lora={align}/lora"),
            *(f"--against.pipeline={self.base}", "--against.name=before", "--seed={seed}", "--batch_size=4"),
            *(f"--{scale}", *self._sides("sampling")),
            *("--scorers+=RewardModelScorer", f"--scorers.path={{train}}/{BEST}", "--scorers.name=own_reward"),
            *([] if self.gpu else ["--device=cpu", "--scorers.device=cpu"]),
        ]


def write_pairs(work: Path, found: Split) -> Path:
    """Write the pairs of all parts; return their folder, the same for equal pairs."""
    return write_once(work / "pairs", {PREFERENCES: lines(found.parts)})


def write_once(beginning: Path, contents: Mapping[str, str]) -> Path:
    """Write files, by their names, into a folder named by ``beginning`` and by what they hold; return the folder."""
    folder = beginning.with_name(f"{beginning.name}-{digest(contents.values())[:16]}")
    for name, content in contents.items():
        write_file(folder / name, content)
    return folder


def prompts_of(found: Split, file: Path | None, own: Family) -> tuple[str, ...]:
    """Return the prompts of the alignment: a file's, or all captions."""
    if file is not None:
        if not file.exists():  # the reader would first name the endings that it takes
            raise InputError(f"prompts: {file} does not exist; give a text file with one prompt per line")
        told = read_prompts(str(file), "prompts")
    else:
        captions = [pair.prompt for pairs in found.parts.values() for pair in pairs if pair.prompt]
        told = tuple(dict.fromkeys(captions))
    if not told:
        raise InputError("align needs prompts, and no picture has a caption; give --prompts a file, one prompt a line")
    own.check_prompts(told, "prompts")
    return told


def write_prompts(work: Path, prompts: Sequence[str], seed: int) -> tuple[Path, str]:
    """Write the prompts to align with, and those to draw pictures for; return their folder and a line on the choice."""
    order = np.random.default_rng(seed).permutation(len(prompts))
    kept = len(prompts) // 4 if len(prompts) >= ENOUGH else 0
    rows = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts]
    judged, others = ([rows[place] for place in some] for some in (order[:kept], order[kept:]))
    texts = {name: "".join(some) for name, some in ((PROMPTS, others), (JUDGED, judged or others))}
    folder = write_once(work / "prompts", texts)
    if kept:
        return folder, f"{len(others)} prompts to align with, {kept} others for the pictures before and after"
    told = f"{number_of(len(others), 'prompt')} to align with, and the same for the pictures"
    return folder, f"{told}: give {ENOUGH} to keep some apart"
