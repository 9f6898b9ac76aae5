"""Jobs of ``make fullsize``: commands of ``latentreward``, by the pipeline that they need.

Commands run in the folder of their group. ``{...}`` in a command is replaced by an entry of :class:`Sizes`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Sizes:
    """What is cut, and what stays.

    Attributes:
        pixels: Side of the images.
        steps: Optimiser steps of a run whose steps are timed; the first is a warm-up.
        accelerator: Lightning's name of the device.
    """

    pixels: int
    steps: int
    accelerator: Literal["cpu", "gpu"]

    def of(self, command: str) -> list[str]:
        """Return the arguments of a command, which no argument has spaces in."""
        entries = {
            "fit": FIT,
            "pairs": PAIRS,
            "pixels": self.pixels,
            "steps": self.steps,
            "more": self.steps + 2,
            "accelerator": self.accelerator,
            "device": {"cpu": "cpu", "gpu": "cuda"}[self.accelerator],
        }
        while "{" in command:
            command = command.format_map(entries)
        return command.split()


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: Name in the tables; the result is kept in a file of this name.
        command: Arguments of ``latentreward``.
        needs: ``peak`` if the estimate of the run's peak counts; ``weights`` if the peak is compared with the weights
            that ``estimated`` has; None for no comparison.
        estimated: Arguments of ``fit --estimate``, if they are not those of the job itself.
        frees: Folders that no later job needs.
    """

    name: str
    command: str
    needs: Literal["peak", "weights"] | None = None
    estimated: str = ""
    frees: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Name of the result's file."""
        return "".join(letter if letter.isalnum() or letter == "." else "_" for letter in self.name) + ".json"


FIT = (
    "--trainer.accelerator={accelerator} --trainer.devices=1 --trainer.strategy=auto "
    "--trainer.accumulate_grad_batches=1 --trainer.enable_progress_bar=false --trainer.enable_model_summary=false"
)
LOADED = "--data.batch_size=2 --data.num_workers=0"
PAIRS = f"{LOADED} --data.size={{pixels}} --data.shared_prompts=keep --trainer.limit_val_batches=1"
ROUNDS = "--trainer.callbacks+=bare_rounds.BareRounds"
VALIDATED = "--trainer.val_check_interval={steps}"
ROLLOUTS = (
    "--model.sampling.height={pixels} --model.sampling.width={pixels} --model.sampling.num_inference_steps=4 "
    "--trainer.callbacks=null --trainer.callbacks+=TrainableCheckpoint --trainer.callbacks+=LastCheckpoint"
)

LRM = "--config=configs/recipes/lrm_sd15.yaml {fit} {pairs} " + VALIDATED
SDXL = "--config=configs/recipes/lrm_sdxl.yaml {fit} {pairs}"
FORWARD = (
    f"{SDXL} --model.backbone.tuning=frozen --model.backbone.text_encoder_tuning=frozen "
    "--model.backbone.frozen_dtype=bfloat16 --model.backbone.vae_dtype=bfloat16 "
    "--model.backbone.gradient_checkpointing=false"
)
DINA = "--config=configs/recipes/dina_lrm_sd35.yaml"
CACHED = f"{DINA} --config=configs/recipes/dina_lrm_sd35_cached.yaml {{fit}} {LOADED} --data.val=null"
LPO = (
    "--config=configs/align/lpo_sd15.yaml {fit} --data.batch_size=2 --data.prompts_per_rollout=2 --data.passes=null "
    f"--trainer.max_steps={{steps}} --model.reward.base=sd15 --model.candidates.num_candidates=2 {ROLLOUTS} "
    "--model.selection=QuantileThreshold --model.selection.quantile=0.5"
)
Z_IMAGE = (
    "--config=configs/model/dina_lrm_z_image.yaml --config=configs/data/hpdv3.yaml {fit} {pairs} "
    f"--trainer.precision=bf16-mixed --trainer.max_steps=2 {VALIDATED[:-7]}2 --trainer.logger=false "
    "--model.backbone.vae_dtype=bfloat16"
)
REFL = f"--config=configs/align/refl_sd35.yaml {{fit}} --model.stop_range=[1,2] --trainer.max_steps=2 {ROLLOUTS}"

GROUPS: dict[str, tuple[Job, ...]] = {
    "sd15": (
        Job("LRM-SD1.5 fit", f"fit {LRM} --trainer.max_steps={{steps}} {ROUNDS}", "peak"),
        Job("LRM-SD1.5 resume", f"fit {LRM} --trainer.max_steps={{more}} --ckpt_path=last", "peak"),
        Job(
            "LRM-SD1.5 validate",
            f"validate {LRM} --ckpt_path=runs/lrm_sd15/checkpoints/last.ckpt",
            "weights",
            LRM,
        ),
        Job(
            "LRM-SD1.5 predict",
            f"predict {LRM} --ckpt_path=runs/lrm_sd15/checkpoints/last.ckpt --predictions.output_dir=predicted "
            "--data.predict.class_path=latentreward.data.PickAPicReader --data.predict.source=../data/pickapic "
            "--data.predict.split=test_unique",
            "weights",
            LRM,
        ),
        Job(
            "LRM-SD1.5 score",
            "score ../data/hpdv3/images.csv scores.csv --model=runs/lrm_sd15 --device={device}",
            "weights",
            LRM,
        ),
        Job(
            "LRM-SD1.5 publish",
            "publish runs/lrm_sd15 published --licence=openrail --device={device}",
            "weights",
            LRM,
            frees=("runs/lrm_sd15",),
        ),
        Job("LRM-SD1.5 serve", "serve published --base=sd15 --device={device}", "weights", LRM),
        Job("LPO-SD1.5 fit", f"fit {LPO} {ROUNDS}", "peak"),
        Job(
            "LPO-SD1.5 generate",
            "generate ../data/prompts.txt pictures --checkpoint=runs/lpo_sd15/checkpoints/last.ckpt "
            "--sampling.num_inference_steps=4 --sampling.height={pixels} --sampling.width={pixels} --best_of=2 "
            "--reward.class_path=LatentReward --reward.path=published --reward.base=sd15 --device={device}",
            "weights",
            LPO,
        ),
    ),
    "sdxl": (
        Job(
            "LRM-SDXL forward, bf16",
            f"validate {FORWARD}",
            "weights",
            FORWARD,
        ),
    ),
    "sdxl_cut": (Job("LRM-SDXL fit, blocks cut", f"fit {SDXL} --trainer.max_steps=2 {VALIDATED[:-7]}2", "peak"),),
    "sd35_t5": (
        Job(
            "SD3.5-M cache, T5 whole",
            "cache cache/train --config=configs/cache/hpdv3_sd35.yaml --trainer.accelerator={accelerator} "
            "--images.buckets=[[{pixels},{pixels}]] --images.min_pixels=1 --num_workers=0 --encoder.text=true "
            "--encoder.text_dtype=bfloat16 --encoder.t5_length=128 --reader.min_confidence=null",
        ),
        Job(
            "DiNa-SD3.5-M fit, cached, T5 whole",
            f"fit {CACHED} --data.predict=null --trainer.limit_val_batches=0 --trainer.val_check_interval=null "
            "--trainer.max_steps=3 --trainer.callbacks+=EncodeOnce",
            "peak",
        ),
    ),
    "sd35": (
        Job(
            "DiNa-SD3.5-M fit, T5 cut",
            f"fit {DINA} {{fit}} {{pairs}} {VALIDATED} --trainer.max_steps={{steps}} {ROUNDS}",
            "peak",
        ),
        Job("ReFL-SD3.5-M fit, T5 cut", f"fit {REFL}", "peak"),
    ),
    "z_image": (Job("DiNa-Z-Image fit, text encoder cut", f"fit {Z_IMAGE}", "peak"),),
}
"""Name of the pipeline → its jobs in order; a group's folder is removed after its last job."""


def jobs() -> Iterator[tuple[str, Job]]:
    """Yield each job with the name of its group."""
    for group, members in GROUPS.items():
        for job in members:
            yield group, job
