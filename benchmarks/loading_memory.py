"""Measure the memory that loading a model takes at its peak, beside the memory that it holds afterwards.

Pipelines of the published sizes with random weights are written first (SD1.5 4 GB in float32, SD3.5-Medium without T5
6 GB in bfloat16), if the folder does not hold them. Each model is loaded in a process of its own. Memory is the
proportional set size (PSS) minus that after imports, read every 20 ms. Linux only.

    python benchmarks/loading_memory.py --folder /tmp/pipelines
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Goal, PeakMemory, table

from latentreward.backbones import create_backbone
from latentreward.backbones.tuning import LoRA
from latentreward.estimate.pipelines import write_pipelines
from latentreward.policies import PolicySource

PARTS = {
    "sd15": (torch.float32, ("unet", "vae", "text_encoder")),
    "sd35": (torch.bfloat16, ("transformer", "vae", "text_encoder", "text_encoder_2")),
}
"""Pipeline -> type of its files, and the parts that get weights."""


def jobs(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return what is loaded, by name."""
    sd15, sd35 = str(folder / "sd15"), str(folder / "sd35")
    adapters: dict[str, Any] = {"tuning": "lora", "lora": LoRA(), "frozen_dtype": "bfloat16"}
    return {
        "LRM-SD1.5, full training": partial(create_backbone, "sd15", source=sd15),
        "LPO-SD1.5, policy in float32": PolicySource(sd15).load,
        "LPO-SD1.5, policy in bfloat16": PolicySource(sd15, frozen_dtype="bfloat16").load,
        "DiNa-SD3.5-Medium, 12 blocks": partial(
            create_backbone, "sd35_medium", source=sd35, num_layers=12, load_t5=False, **adapters
        ),
    }


def write_weights(folder: Path) -> None:
    """Write the pipelines, part by part, with the initial weights of diffusers and transformers."""
    import diffusers
    import transformers

    families: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel,
        "transformer": diffusers.SD3Transformer2DModel,
        "vae": diffusers.AutoencoderKL,
    }
    write_pipelines(folder)
    for name, (dtype, parts) in PARTS.items():
        for part in parts:
            place = folder / name / part
            text = transformers.CLIPTextModelWithProjection if name == "sd35" else transformers.CLIPTextModel
            family = families.get(part, text)
            if part in families:
                network = family.from_config(family.load_config(place))
            else:
                network = family(family.config_class.from_pretrained(place))
            torch.nn.Module.to(network, dtype).save_pretrained(place)


def measure(load: Callable[[], Any]) -> dict[str, int]:
    """Load a model in this process; return bytes of its weights, held afterwards, and at the peak."""
    import transformers.models.clip.modeling_clip  # noqa: F401

    import latentreward.encoders.clip
    import latentreward.encoders.sd3  # noqa: F401

    with PeakMemory() as memory:
        model = load()
        for tensor in (*model.parameters(), *model.buffers()):  # touch each mapped page
            tensor.detach().view(-1)[:: max(1, 1024 // tensor.element_size())].float().sum()
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
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(jobs(options.folder)[options.job])))
        return
    if not (options.folder / "sd35" / "vae" / "diffusion_pytorch_model.safetensors").is_file():
        write_weights(options.folder)
    rows = []
    for name in jobs(options.folder):
        command = [sys.executable, __file__, "--folder", str(options.folder), "--job", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        sizes = [f"{found[kind] / 1e9:.2f}" for kind in ("weights", "after", "peak")]
        peak = found["peak"] / found["after"]
        rows.append([name, *sizes, f"{peak:.2f}", Goal(peak, most=1.15)])
    table("Memory of loading, GB", ("model", "weights", "held afterwards", "peak", "peak / held", "goal"), rows)


if __name__ == "__main__":
    main()
