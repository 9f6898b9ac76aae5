"""``make demo``: train two tiny reward models, align the tiny generator with one of them, and print the results.

``make demo-edits`` pretrains a tiny editor, unless that was done before, and trains a reward of its edits.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.Image import Resampling
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentreward.core.bootstrap import bootstrap_interval
from latentreward.core.errors import silence_libraries
from latentreward.tinyworld.sampling import Judged, before_and_after, judge_policy
from tools.pretraining.editors import main as pretrain_editor

CEILING = "ceiling   0.870   (the labels are noisy: the true utility itself agrees with this share)"
"""Accuracy of the true utility against the noisy labels, which no model can exceed."""
BLIND = "blind     0.715   (the most that a judge of the results alone could reach, who does not see what was edited)"
"""Accuracy of edits' true utility given the results alone (reproduction/rows/edit_reward.yaml)."""
EDITOR = "ip2p_tiny"
GUIDANCE = 1.0
"""Guidance scale in alignment and for the pictures before and after."""
PAIRS, ENLARGED = 60, 256
"""Number of captions whose pictures are saved one by one at most, and the side of these pictures in pixels."""


@dataclass(frozen=True)
class Training:
    """One run of ``latentreward fit``."""

    name: str  # of the run and of its folder
    title: str  # in the printed report
    configs: tuple[str, ...]  # config files of the run
    settings: tuple[str, ...] = ()  # further command-line settings; ``{output}`` stands for the folder of all results
    # Metrics to show during training: (name in the log, printed name).
    watched: tuple[tuple[str, str], ...] = (("train/loss", "loss"), ("train/accuracy", "batch accuracy"))

    def command(self, output: Path, options: list[str]) -> list[str]:
        """Return the command line of the run."""
        return [
            *(sys.executable, "-m", "latentreward", "fit"),
            *(f"--config={config}" for config in self.configs),
            *(setting.format(output=output) for setting in self.settings),
            f"--trainer.default_root_dir={output / self.name}",
            *options,
        ]


def falling(steps: int) -> tuple[str, ...]:
    """Return settings of a run of ``steps`` whose learning rate falls to a twentieth.

    Its rewards rank held-out pairs as well as after 1.4 times the steps with a constant rate (docs/measurements.md).
    """
    schedule = {"start_factor": 1, "end_factor": 0.05, "total_iters": steps}
    rate = (f"--model.lr_scheduler.{name}={value}" for name, value in schedule.items())
    return f"--trainer.max_steps={steps}", "--model.lr_scheduler=LinearLR", *rate


LRM = Training(
    "lrm_tiny",
    "LRM: tiny Stable Diffusion's U-Net, Pick-a-Pic layout",
    ("configs/model/lrm_tiny.yaml", "configs/data/tinyworld_pickapic.yaml", "configs/trainer/demo.yaml"),
    # Without feature enhancement, which costs a second pass and does not raise agreement (row `lrm_guidance_repeated`).
    ("--data.root={output}/data/tinyworld_pickapic", "--model.head.init_args.guidance=1", *falling(280)),
)
DINA_LRM = Training(
    "dina_lrm_tiny",
    "DiNa-LRM: tiny SD3.5's transformer, HPDv3 layout",
    ("configs/model/dina_lrm_tiny.yaml", "configs/data/tinyworld_hpdv3.yaml", "configs/trainer/demo.yaml"),
    ("--data.root={output}/data/tinyworld_hpdv3", *falling(220)),
)
LPO = Training(
    "lpo_tiny",
    "LPO: tiny Stable Diffusion aligned with that LRM, step by step in its latent space",
    ("configs/align/lpo_tiny.yaml",),
    ("--model.reward.path={output}/lrm_tiny/reward.ckpt", f"--model.guidance_scale={GUIDANCE}"),
    (("train/loss", "loss"), ("train/implicit_accuracy", "implicit accuracy")),
)
EDIT_REWARD = Training(
    "reward_ip2p_tiny",
    "A reward of edits: tiny InstructPix2Pix, which learns the judge's followed and kept",
    ("configs/data/tinyworld_edits.yaml", "configs/edits/reward_ip2p_tiny.yaml", "configs/trainer/demo.yaml"),
    ("--data.root={output}/data/tinyworld_edits", f"--model.backbone.source={{output}}/editors/{EDITOR}"),
    (("train/loss", "loss"),),
)
LEVELS = {
    LRM: tuple((f"t{t}", f"t = {t}") for t in (1, 251, 501, 801)),
    DINA_LRM: (*((f"sigma{s}", f"σ = {s}") for s in (0.2, 0.5, 0.8)), ("ensemble", "ensemble")),
    EDIT_REWARD: (*((f"sigma{s}", f"σ = {s}") for s in (0.1, 0.3, 0.5)), ("ensemble", "ensemble")),
}
"""Noise levels of the evaluation for each run: (name in the log, printed name)."""


def scalars(folder: Path) -> dict[str, tuple[int, float]]:
    """Read the last (step, value) of every scalar in the TensorBoard log of ``folder``; empty without a log."""
    if not list(folder.glob("events.out.tfevents.*")):
        return {}
    log = EventAccumulator(str(folder), size_guidance={"images": 1})
    log.Reload()
    return {tag: (log.Scalars(tag)[-1].step, log.Scalars(tag)[-1].value) for tag in log.Tags()["scalars"]}


def train(trainings: Sequence[Training], output: Path, options: list[str]) -> None:
    """Run trainings in parallel, with one thread each, and print their progress.

    Raises:
        SystemExit: If a training fails; its output is in ``train.log`` of its folder.
    """
    running = {}
    for training in trainings:
        folder, command = output / training.name, training.command(output, options)
        if (folder / "train.log").exists():  # of an earlier demo, whose results would be shown as those of this one
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        print("$", " ".join(command).replace(sys.executable, "python"), flush=True)
        with (folder / "train.log").open("w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            running[training] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    started, told, told_at, ended = time.monotonic(), "", 0.0, False
    while not ended:
        time.sleep(5)
        codes = {training: process.poll() for training, process in running.items()}
        ended = any(codes.values()) or None not in codes.values()
        line = "  |  ".join(progress(training, output, code is not None) for training, code in codes.items())
        seconds = time.monotonic() - started
        if line != told and (ended or sys.stdout.isatty() or seconds - told_at >= 60):
            print(f"  {seconds:4.0f} s  {line}", flush=True)
            told, told_at = line, seconds
    if failed := next((training for training, code in codes.items() if code), None):
        for other in running.values():
            other.terminate()
        path = output / failed.name / "train.log"
        sys.exit(f"{failed.name} failed; the end of {path}:\n{path.read_text()[-2000:]}")


def progress(training: Training, output: Path, ended: bool) -> str:
    """Describe the progress of a training in a few words."""
    values = scalars(output / training.name)
    if ended:
        return f"{training.name} done"
    shown = [f"{words} {values[name][1]:.3f}" for name, words in training.watched if name in values]
    if not shown:
        return f"{training.name} starting"
    return f"{training.name} step {values[training.watched[0][0]][0] + 1}, " + ", ".join(shown)


def report_rewards(trainings: Sequence[Training], output: Path) -> None:
    """Print the held-out accuracy at each noise level."""
    for training in trainings:
        values = scalars(output / training.name)
        print(f"\n{training.title}\n  held-out pair accuracy against the drawn labels")
        for level, label in LEVELS[training]:
            print(f"    {label:<9} {values[f'val/accuracy_{level}'][1]:.3f}")
        print(f"    {BLIND if training is EDIT_REWARD else CEILING}")
        print("    chance    0.500")
    print(flush=True)


def report_policy(output: Path, before: Judged) -> Judged:
    """Sample from the aligned generator, print the judge's verdicts, and save pictures of before and after."""
    after = judge_policy("sd_tiny", output / LPO.name / "lora", GUIDANCE)
    change, low, high, _ = bootstrap_interval([after.utility - before.utility])
    print(f"\n{LPO.title}\n  utility of {len(before.captions)} pictures by the judge, not by the reward (0 to 6)")
    print(f"    before    {before.utility.mean():.3f}   after {after.utility.mean():.3f}")
    print(f"    change    {change:+.3f}  [{low:+.3f}, {high:+.3f}]  (95 % interval over captions)")
    for name in ("alignment", "quality"):
        print(f"    {name:<9} {before.verdict[name]:.3f} -> {after.verdict[name]:.3f}")
    before_and_after(before, after).save(output / LPO.name / "before_after.png")
    save_pictures(output / "pictures", before, after)
    return after


def save_pictures(folder: Path, before: Judged, after: Judged) -> None:
    """Save enlarged pictures with their captions as ``chosen`` and ``rejected``: of one caption the judge's choice.

    The folder has the form of pairs of one's own, so that README can show what is done with such.
    """
    changed = [place for place, gain in enumerate(after.utility - before.utility) if gain][:PAIRS]
    for number, place in enumerate(changed):
        better = after if after.utility[place] > before.utility[place] else before
        for side, judged in (("chosen", better), ("rejected", before if better is after else after)):
            (folder / side).mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(judged.pictures[place]).resize((ENLARGED, ENLARGED), Resampling.NEAREST)
            picture.save(folder / side / f"{number:02}.png")
            (folder / side / f"{number:02}.txt").write_text(judged.captions[place], encoding="utf-8")


def accuracy(training: Training, output: Path) -> str:
    """Return the accuracy of a reward at its first noise level, in words."""
    value = scalars(output / training.name)[f"val/accuracy_{LEVELS[training][0][0]}"][1]
    return f"ranks {value:.1%} of held-out pairs as labelled"


def print_end(output: Path, lines: Sequence[str]) -> None:
    """Say what was trained, how good it is, where the pictures are, and what comes next."""
    print("\n".join(("", *lines)))
    print(f"learning curves   .venv/bin/tensorboard --logdir {output}")
    print("Next, your own pictures (20 pairs or more): .venv/bin/latentreward taste FOLDER --rate", flush=True)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of all results (default: demo)")
    parser.add_argument("--edits", action="store_true", help="whether to show a reward of edits instead")
    arguments, options = parser.parse_known_args()
    silence_libraries()
    started, output = time.monotonic(), arguments.output
    if arguments.edits:
        print(f"{EDITOR}: pretrained once, in {output / 'editors'}", flush=True)
        pretrain_editor([EDITOR, f"--output={output / 'editors'}"])
        train((EDIT_REWARD,), output, options)
        report_rewards((EDIT_REWARD,), output)
        folder = output / EDIT_REWARD.name
        lines = [f"reward of edits   {folder}/reward.ckpt {accuracy(EDIT_REWARD, output)}"]
        lines += [f"pictures          {folder}/scored_pairs.png"]
    else:
        train((LRM, DINA_LRM), output, options)
        report_rewards((LRM, DINA_LRM), output)
        with ThreadPoolExecutor(1) as pool:
            early = pool.submit(judge_policy, "sd_tiny", None, GUIDANCE)
            train((LPO,), output, options)
            after = report_policy(output, before := early.result())
        rise = f"raises the judge's utility from {before.utility.mean():.2f} to {after.utility.mean():.2f} of 6"
        lines = [
            f"LRM               {output}/lrm_tiny/reward.ckpt {accuracy(LRM, output)}",
            f"DiNa-LRM          {output}/dina_lrm_tiny/reward.ckpt {accuracy(DINA_LRM, output)}",
            f"LoRA by LPO       {output}/lpo_tiny/lora {rise}",
            f"before and after  {output}/lpo_tiny/before_after.png",
            f"single pictures   {output}/pictures",
            f"scored pairs      {output}/lrm_tiny/scored_pairs.png, {output}/dina_lrm_tiny/scored_pairs.png",
        ]
    print(f"\n{time.monotonic() - started:.0f} s in all")
    print_end(output, lines)


if __name__ == "__main__":
    main()
