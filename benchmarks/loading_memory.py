"""Measure the memory that loading a model takes at its peak, beside the memory that it holds afterwards.

Pipelines of the published sizes and an LRM with random weights are written first (SD1.5 4 GB and LRM 2 GB in float32,
SD3.5-Medium without T5 6 GB in bfloat16), if the folder does not hold them. Each model is loaded in a process of its
own. Memory is the proportional set size (PSS) minus that after imports, read every 20 ms. Linux only.

    python benchmarks/loading_memory.py --folder /tmp/pipelines
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Goal, table
from memory import PeakMemory
from random_pipelines import write_weights
from torch import nn

from latentreward.alignment import LatentReward, PolicySource
from latentreward.apps.estimate.pipelines import write_pipelines
from latentreward.core.checkpoints.base_weights import BaseSample
from latentreward.core.checkpoints.shards import frozen_names
from latentreward.core.registry import create_backbone
from latentreward.diffusion import LoRA
from latentreward.reward import CLIPProjectionHead, LRMLoss, LRMModule, RewardModel

TYPES = {"sd15": torch.float32, "sd35": torch.bfloat16}
"""Pipeline -> type of its files."""
RANKS = 2


def jobs(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return what is loaded, by name."""
    sd15, sd35 = str(folder / "sd15"), str(folder / "sd35")
    adapters: dict[str, Any] = {"tuning": "lora", "lora": LoRA(), "frozen_dtype": "bfloat16"}
    return {
        "LRM-SD1.5, full training": partial(create_backbone, "sd15", source=sd15),
        "LPO-SD1.5, policy in float32": PolicySource(sd15).load,
        "LPO-SD1.5, policy in bfloat16": PolicySource(sd15, frozen_dtype="bfloat16").load,
        "LPO-SD1.5 with its reward, both in bfloat16": partial(load_lpo, sd15, str(folder / "reward")),
        "DiNa-SD3.5-Medium, 12 blocks": partial(
            create_backbone, "sd35_medium", source=sd35, num_layers=12, load_t5=False, **adapters
        ),
    }


def load_lpo(sd15: str, reward: str) -> nn.Module:
    """Load the policy and the reward of LPO as under bf16-mixed."""
    policy = PolicySource(sd15, frozen_dtype="bfloat16").load()
    scorer = LatentReward(reward, base=sd15).load(policy)
    scorer.set_precision(torch.bfloat16)
    return nn.ModuleList([policy, scorer])


def write_reward(folder: Path) -> None:
    """Write the model folder of an LRM-SD1.5 with random weights."""
    source, run = str(folder / "sd15"), folder / "run"
    module = LRMModule(create_backbone("sd15", source=source), CLIPProjectionHead, LRMLoss())
    state, base = module.state_dict(), BaseSample.of(module, source)
    saved = {name: state[name] for name in state.keys() - frozen_names(module)}
    run.mkdir(exist_ok=True)
    torch.save({"state_dict": saved, "base": base.record(saved), "exif": "ignore"}, run / "reward.ckpt")
    backbone = {"class_path": "sd15", "init_args": {"source": source}}
    head = {"class_path": "CLIPProjectionHead"}
    settings = {"class_path": "LRMModule", "init_args": {"backbone": backbone, "head": head}}
    (run / "config.yaml").write_text(json.dumps({"model": settings}))  # JSON is YAML
    RewardModel.from_pretrained(run).save_pretrained(folder / "reward")
    shutil.rmtree(run)


def measure(load: Callable[[], Any]) -> dict[str, int]:
    """Load a model in this process; return bytes of its weights, held once all ranks have loaded, and at the peak."""
    import transformers.models.clip.modeling_clip  # noqa: F401

    with PeakMemory() as memory:
        model = load()
        for tensor in (*model.parameters(), *model.buffers()):  # touch each mapped page
            tensor.detach().view(-1)[:: max(1, 1024 // tensor.element_size())].float().sum()
        print("loaded", flush=True)
        sys.stdin.readline()
    return {
        "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "after": memory.after - memory.before,
        "peak": memory.peak - memory.before,
    }


def main() -> None:
    """Write the pipelines, measure each job in its own process, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/full_size"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--reward", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reward:
        write_reward(options.folder)
        return
    if options.job:
        print(json.dumps(measure(jobs(options.folder)[options.job])), flush=True)
        sys.stdin.readline()  # the others measure while this process still maps the weights
        return
    if not (options.folder / "sd35" / "vae" / "diffusion_pytorch_model.safetensors").is_file():
        write_pipelines(options.folder)
        shutil.rmtree(options.folder / "sd35" / "text_encoder_3")  # T5 is not loaded
        for name, dtype in TYPES.items():
            write_weights(options.folder / name, dtype)
    if not (options.folder / "reward").is_dir():  # in a process of its own, which maps nothing while others measure
        subprocess.run([sys.executable, __file__, "--folder", str(options.folder), "--reward"], check=True)
    rows, together = [], []
    for name in jobs(options.folder):
        (found,) = on_ranks(1, options.folder, name)
        sizes = [f"{found[kind] / 1e9:.2f}" for kind in ("weights", "after", "peak")]
        peak = found["peak"] / found["after"]
        rows.append([name, *sizes, f"{peak:.2f}", Goal(peak, most=1.15)])
        held = sum(rank["after"] for rank in on_ranks(RANKS, options.folder, name))
        once = held / found["after"]
        together.append([name, sizes[1], f"{held / 1e9:.2f}", f"{once:.2f}"])
    table("Memory of loading, GB", ("model", "weights", "held afterwards", "peak", "peak / held", "goal"), rows)
    columns = ("model", "one process", f"{RANKS} processes together", "ratio")
    table("Memory of several processes that load the same model, GB; what trains is not shared", columns, together)


def on_ranks(ranks: int, folder: Path, name: str) -> list[dict[str, int]]:
    """Measure a job in several processes at once, as ranks of one machine."""
    command = [sys.executable, __file__, "--folder", str(folder), "--job", name]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "LOCAL_WORLD_SIZE": str(ranks)}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(ranks)]
    for process in processes:
        if not any(line == "loaded\n" for line in process.stdout):
            raise SystemExit(f"{name}: a process failed")
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    found = [json.loads(process.stdout.readline()) for process in processes]
    for process in processes:
        process.stdin.close()
        process.wait()
    return found


if __name__ == "__main__":
    main()
