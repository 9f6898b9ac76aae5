"""Blocks of ``gpu.py``, each measured by ``python benchmarks/gpu_blocks.py BLOCK FILE DEVICE [tiny]``.

Peaks are ``torch.cuda.max_memory_allocated``. For training steps they stand beside those of ``fit --estimate``, which
computes them from the same settings.
"""

import gc
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import isnan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from alignment import TERA, Scoring, clip_h, flops, replace_prompts
from gpu_families import MODELS, family_rows
from jsonargparse import Namespace
from latentreward.callbacks import Performance
from measuring import TABLES, Goal, Spread, circumstances, interleaved, ratio, seconds, table
from random_pipelines import RandomLatentReward, RandomPolicy, materialise, random_states
from torch import Tensor, nn
from torch.nn import functional as F

from latentreward.apps.commands.fit import TrainingCLI
from latentreward.apps.estimate.estimate import unread_module
from latentreward.apps.estimate.step_costs import make_batch, optimizer_of, step_costs
from latentreward.apps.estimate.unread import ConfigSources, unset_variables
from latentreward.core.contracts import map_tensors
from latentreward.core.registry import backbone_names
from latentreward.core.settings.functions import prepare_parsing
from latentreward.core.settings.rewriting import rewrite_arguments
from latentreward.core.storage.durable import write_file
from latentreward.diffusion import LoRA
from latentreward.diffusion.backbones.fused_lora import fuse_lora

GB = 1e9
Row = list[Any]


@dataclass(frozen=True)
class Setting:
    """Where and how large a block is measured, and what is called after each row."""

    device: str
    tiny: bool
    repeats: int = 5
    row_done: Callable[[], None] = lambda: None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights that do not train."""
        return torch.float32 if self.tiny else torch.bfloat16

    def autocast(self) -> torch.autocast:
        """Return the context of a pass in mixed precision."""
        return torch.autocast(self.device, torch.bfloat16, enabled=not self.tiny)


def peak_of(work: Callable[[], Any], device: str) -> float:
    """Return the peak of allocated bytes during one call, with all that is held already; NaN on a CPU."""
    if device != "cuda":
        work()
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated())


def gigabytes(size: float) -> str:
    """Format a number of bytes as GB; nothing for NaN."""
    return f"{size / GB:.2f}" if not isnan(size) else ""


def guarded(columns: Sequence[str], works: dict[str, Callable[[], Iterator[Row]]], setting: Setting) -> Iterator[Row]:
    """Yield the rows of several works; where memory does not suffice or something fails, a row that says so."""
    for name, work in works.items():
        try:
            for row in work():
                yield row
                setting.row_done()
        except torch.OutOfMemoryError:
            yield [name, "out of memory", *[""] * (len(columns) - 2)]
        except Exception as error:  # whatever it is, the other rows are measured
            reason = (str(error).splitlines() or [""])[0][:160].replace("|", "/")
            yield [name, f"failed: {type(error).__name__}: {reason}", *[""] * (len(columns) - 2)]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# --- scoring a step ------------------------------------------------------------------------------------------------

STATES = {"sd15": 8, "sdxl": 4, "sd35": 4, "toy": 1, "toy_sd35": 1}
PAPER = {"sd15": 6.2}
"""Size → paper's ratio of the pixel path to LRM, by time."""


def score_rows(size: str, setting: Setting) -> Iterator[Row]:
    """Yield a row for the latent reward and one for each pixel path."""
    scoring = Scoring(size, STATES[size], setting.device, dtype=setting.dtype)
    tower = clip_h(setting.device, setting.dtype, 1 if setting.tiny else 32)
    parts: dict[str, Callable[[], Any]] = {
        "latent reward": scoring.lrm,
        "prediction": scoring.prediction,
        "decoder": scoring.decoding,
        "CLIP-H": partial(tower, STATES[size]),
    }
    with setting.autocast():
        times = interleaved(parts, setting.repeats)
        work = {name: flops(part) / STATES[size] for name, part in parts.items()}
        peaks = {name: peak_of(part, setting.device) for name, part in parts.items()}
    latent = times["latent reward"]
    for name, used in {
        "latent reward": ["latent reward"],
        "pixels, fresh x̂_0": ["prediction", "decoder", "CLIP-H"],
        "pixels, reused x̂_0": ["decoder", "CLIP-H"],
    }.items():
        spent = Spread([sum(each) for each in zip(*(times[part].values for part in used), strict=True)], ".4f")
        counted, per_state = sum(work[part] for part in used), Spread([n / STATES[size] for n in spent.values], ".4f")
        gain = ratio(spent, latent)
        goal = Goal(gain.median, least=PAPER[size]) if size in PAPER and "fresh" in name else ""
        peak = max(peaks[part] for part in used)
        cells = [per_state, f"{counted / TERA:.2f}", f"{counted / TERA / per_state.median:.0f}", gigabytes(peak)]
        yield [f"{size}, {name}", *cells, gain, f"{counted / work['latent reward']:.1f}", goal]


def block_scoring(setting: Setting) -> None:
    """Print the table of scoring a step."""
    columns = ("what scores", "s per state", "TFLOP", "TFLOP/s", "peak, GB", "time / latent", "FLOPs / latent", "paper")
    sizes = ("toy", "toy_sd35") if setting.tiny else ("sd15", "sdxl", "sd35")
    works = {size: partial(score_rows, size, setting) for size in sizes}
    table("Scoring a step of a sampler; weights in bfloat16", columns, guarded(columns, works, setting))


# --- DiNa-LRM against a vision-language model ----------------------------------------------------------------------

IMAGE_TOKENS, TEXT_TOKENS = 256, 400
CLAIMS = {"score": {"FLOPs": 0.29}, "policy step": {"FLOPs": 0.54, "peak": 0.49}}
"""What is measured → quantity → paper's ratio of DiNa-LRM to the vision-language model (−71 %, −46 %, −51 %)."""


class VisionLanguageScorer(nn.Module):
    """Network of Qwen2-VL-7B's size (arXiv:2409.12191) with a linear score, on one image and a prompt."""

    def __init__(self, tiny: bool) -> None:
        super().__init__()
        from transformers import Qwen2VLConfig, Qwen2VLModel

        side = 2 * int(IMAGE_TOKENS**0.5)
        text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584}
        if tiny:
            text = {"hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
            vision, side = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 512}, 4
        config = Qwen2VLConfig(text_config={**text, "num_key_value_heads": 4}, vision_config=vision)
        self.model, self.head, self.side = Qwen2VLModel(config), nn.Linear(text["hidden_size"], 1), side
        self.requires_grad_(False)
        self.width = text["hidden_size"]

    def forward(self, pixels: Tensor) -> Tensor:
        """Score pixels ``(1, 3, H, W)``, differentiably; the tokens of the prompt are zeros."""
        small = F.interpolate(pixels.float(), (14 * self.side,) * 2, mode="bilinear").to(self.head.weight.dtype)
        half = self.side // 2
        grid = small.reshape(3, half, 2, 14, half, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)  # 2 × 2 patches per token
        patches = grid.reshape(self.side**2, 3, 1, 196).expand(-1, -1, 2, -1).reshape(self.side**2, -1)
        found = self.model.visual(patches, grid_thw=torch.tensor([[1, self.side, self.side]], device=pixels.device))
        image = getattr(found, "pooler_output", found)
        tokens = torch.cat([image, image.new_zeros(TEXT_TOKENS, self.width)]).unsqueeze(0)
        places = torch.arange(tokens.shape[1], device=pixels.device).expand(3, 1, -1)
        read = self.model.language_model(inputs_embeds=tokens, position_ids=places, use_cache=False)
        return self.head(read.last_hidden_state[:, -1]).squeeze(-1)


class Scorers:
    """Policy of SD3.5-Medium's size at 1024², and a reward of its clean latents; DiNa-LRM uses the policy's network."""

    def __init__(self, setting: Setting, reward: str) -> None:
        self.setting, self.kind, size = setting, reward, "toy_sd35" if setting.tiny else "sd35"
        with torch.device("meta"):
            self.policy = RandomPolicy(source=size, lora=LoRA(64, 128), gradient_checkpointing=True).load()
            self.dina = RandomLatentReward(size, share=True).load(self.policy)
            self.vlm = VisionLanguageScorer(setting.tiny) if reward == "VLM" else None
        replace_prompts(size, self.policy, self.dina, setting.device)
        kept: list[nn.Module] = [self.policy, self.dina if self.vlm is None else self.vlm]
        materialise(nn.ModuleList(kept), setting.device, setting.dtype)
        if self.vlm is not None and self.policy.vae is not None:
            self.policy.vae.vae.enable_gradient_checkpointing()
            self.vlm.model.gradient_checkpointing_enable()
            self.vlm.train()  # in training alone, blocks are recomputed
        self.latents = random_states(self.policy, 1, setting.device)
        self.encoded, self.rows = self.policy.encode_prompts(["a"]), torch.zeros(1, dtype=torch.int64)
        self.timesteps = torch.full((1,), 501.0, device=setting.device)

    def reward(self, latents: Tensor) -> Tensor:
        """Score clean latents, differentiably."""
        if self.vlm is not None:
            assert self.policy.vae is not None
            return self.vlm(self.policy.vae.decode(latents))
        model, levels = self.dina.model, 3 if self.kind == "ensemble of 3" else 1
        features = [model.backbone(latents, self.timesteps, self.encoded, None) for _ in range(levels)]
        return model.head.score_ensemble(features) if levels > 1 else model.head(features[0])

    def score(self) -> None:
        """Score without gradients."""
        with torch.no_grad(), self.setting.autocast():
            self.reward(self.latents)

    def gradient(self) -> None:
        """Compute the gradient of the score with respect to the latents."""
        latents = self.latents.clone().requires_grad_()
        with self.setting.autocast():
            score = self.reward(latents).sum()
        score.backward()

    def policy_step(self) -> None:
        """Compute the gradient of the policy's adapter through its prediction of clean latents and their score."""
        with self.setting.autocast():
            velocity = self.policy.predict(self.latents, self.timesteps, self.encoded)
            score = self.reward(self.latents - 0.5 * velocity.float()).sum()
        score.backward()
        self.policy.zero_grad()


def vlm_rows(reward: str, setting: Setting, of_vlm: dict[str, dict[str, float]]) -> Iterator[Row]:
    """Yield a row for each measured quantity; ``of_vlm`` keeps those of the vision-language model."""
    scorers = Scorers(setting, reward)
    for name, work in {
        "score": scorers.score,
        "gradient": scorers.gradient,
        "policy step": scorers.policy_step,
    }.items():
        work()
        spent = Spread([seconds(work) for _ in range(setting.repeats)], ".4f")
        peak = peak_of(work, setting.device)  # before FLOPs are counted, which keeps recomputed tensors
        found = {"s": spent.median, "FLOPs": flops(work), "peak": peak}
        if reward == "VLM":
            of_vlm[name] = found
        shares: Row = []
        for key, value in found.items():
            share = value / of_vlm[name][key] if name in of_vlm else float("nan")
            shares.append(f"{share:.2f}" if not isnan(share) else "")
            if key != "s":
                bound = CLAIMS.get(name, {}).get(key) if reward == "one level" and not isnan(share) else None
                shares.append(Goal(share, most=bound) if bound else "")
        yield [f"{reward}, {name}", spent, f"{found['FLOPs'] / TERA:.2f}", gigabytes(peak), *shares]


def block_vlm(setting: Setting) -> None:
    """Print the table of DiNa-LRM against a vision-language model."""
    shares = ("s / VLM's", "FLOPs / VLM's", "paper (one level)", "peak / VLM's", "paper (one level)")
    columns = ("reward", "s", "TFLOP", "peak, GB", *shares)
    found: dict[str, dict[str, float]] = {}
    works = {name: partial(vlm_rows, name, setting, found) for name in ("VLM", "one level", "ensemble of 3")}
    title = "One 1024² image: DiNa-LRM on 12 blocks, and a scorer of Qwen2-VL-7B's size with VAE decoder"
    table(title, columns, guarded(columns, works, setting))


# --- training steps ------------------------------------------------------------------------------------------------


class Settings(TrainingCLI):
    """Parsed settings of ``fit``; nothing is run."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class RandomTensors:
    """Maker of random tensors on a device, in place of an estimate's stand-ins."""

    def __init__(self, device: str) -> None:
        self.device = device

    def stand_in(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor of random numbers in [-1, 1]."""
        return (2 * torch.rand(tuple(shape), device=self.device) - 1).to(dtype)


class Step:
    """Training step of the settings of ``fit``, with random weights on a device.

    Args:
        options: Options of ``fit``.
        setting: Where it runs.
    """

    def __init__(self, options: Sequence[str], setting: Setting) -> None:
        from lightning.pytorch import Trainer

        self.setting, self._held = setting, ExitStack()
        self._folder = Path(self._held.enter_context(TemporaryDirectory(prefix="latentreward-")))
        self._held.enter_context(unset_variables())
        prepare_parsing(options, classes=True)
        arguments = rewrite_arguments([*options, "--estimate"], backbone_names(), root="fit.")
        self._cli = Settings("fit", arguments, self._held)
        self.module: Any = self._unread()
        materialise(self.module, setting.device)
        kind, precision = "gpu" if setting.device == "cuda" else "cpu", self._parsed().trainer.precision
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        self.module.trainer = Trainer(accelerator=kind, devices=1, precision=precision, **quiet)
        self.module.log = self.module.log_dict = lambda *_, **__: None
        self.module.train()
        self.optimizer = optimizer_of(self.module, foreach=setting.device == "cuda")
        self.batch: Any = None

    def _parsed(self) -> Any:
        return self._cli.config["fit"].clone()

    def _unread(self) -> Any:
        def build(settings: Namespace) -> Any:
            return self._cli.parser.instantiate(Namespace(subcommand="fit", fit=Namespace(model=settings.model)))[
                "fit"
            ].model

        return unread_module(self._parsed(), build, ConfigSources(self._folder))

    def estimate(self) -> Any:
        """Return what ``--estimate`` computes for the same settings."""
        return step_costs(self._unread(), self._parsed().data, gpu=self.setting.device == "cuda")

    def make_batch(self) -> None:
        """Make the batch; a module that learns from rollouts makes a rollout."""
        made = make_batch(self.module, self._parsed().data, RandomTensors(self.setting.device))  # type: ignore[arg-type]
        self.batch = map_tensors(made, lambda tensor: tensor.to(self.setting.device))

    def train(self) -> None:
        """Do a forward and a backward pass, and the optimiser's update."""
        with self.module.trainer.precision_plugin.train_step_context():
            result = self.module.training_step(self.batch, 0)
        (result["loss"] if isinstance(result, dict) else result).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        """Remove temporary files."""
        self._held.close()


STEP_COLUMNS = (
    "step", "batch's rollout, s", "training step, s", "TFLOP", "TFLOP/s", "peak, GB", "estimate, GB", "peak / estimate",
    "goal",
)  # fmt: skip


def step_row(name: str, options: Sequence[str], setting: Setting, most: float | None = None) -> Iterator[Row]:
    """Yield the row of a training step; ``most`` is the goal of its peak in GB."""
    step = Step(options, setting)
    try:
        costs = step.estimate()
        step.make_batch()
        step.train()  # makes the optimiser's state
        step.batch = None
        made, taken = Spread([], ".3f"), Spread([], ".3f")

        def measure() -> None:
            made.values.append(seconds(step.make_batch))
            taken.values.extend(seconds(step.train) for _ in range(setting.repeats))

        peak = peak_of(measure, setting.device)
    finally:
        step.close()
    work = (costs.forward + costs.backward) / TERA
    share = peak / costs.peak
    goal = (
        Goal(peak / GB, most=most) if most else Goal(share, least=0.85, most=1.15) if setting.device == "cuda" else ""
    )
    cells = [f"{work:.2f}", f"{work / taken.median:.1f}", gigabytes(peak), gigabytes(costs.peak), f"{share:.2f}"]
    yield [name, made, taken, *cells, goal if setting.device == "cuda" else ""]


def config(*names: str) -> list[str]:
    """Return the options that name shipped files."""
    return [f"--config=configs/{name}.yaml" for name in names]


def sd35(method: str, *options: str, side: int = 512) -> list[str]:
    """Return the options of a method on SD3.5-Medium, at a size of pictures."""
    size = [f"--model.sampling.{edge}={side}" for edge in ("height", "width")]
    return [*config("policy/sd35_medium", f"method/{method}"), "--trainer.devices=8", *size, *options]


KEEP_ALL = ("--model.selection=QuantileThreshold", "--model.selection.quantile=0.0")
"""Options of LPO by which pairs of random scores are kept."""
EIGHT_BITS = "--model.optimizer=bitsandbytes.optim.AdamW8bit"
REWARDS = {
    "LRM-SD1.5, 16 pairs of 512²": config("recipes/lrm_sd15"),
    "LRM-SD1.5, AdamW of 8 bits": [*config("recipes/lrm_sd15"), EIGHT_BITS],
    "LRM-SDXL, 4 pairs of 1024²": [
        *config("model/lrm_sdxl", "data/pickapic_v1", "trainer/one_gpu"),
        "--data.size=1024",
        "--data.batch_size=4",
    ],
    "DiNa-LRM-SD3.5-M, 4 pairs of 1024²": config("recipes/dina_lrm_sd35"),
    **{
        f"{title}-SD3.5-M, 4 pairs of 1024²": [*config("recipes/dina_lrm_sd35"), *config(f"model/{name}_sd35")]
        for title, name in {"PAVRM": "pavrm", "DRM": "drm", "LayerMix": "layer_mix"}.items()
    },
}
ALIGNMENT = {
    "LPO-SD1.5, 10 pairs of 512²": [*config("align/lpo_sd15"), *KEEP_ALL],
    "LPO-SDXL, 1024²": [*config("align/lpo_sdxl"), *KEEP_ALL, "--data.prompts_per_rollout=1", "--data.batch_size=4"],
    "step-wise GRPO-SD3.5-M": sd35("grpo_stepwise"),
    "ReFL-SD3.5-M, 1024²": config("align/refl_sd35"),
}
ONE_PROMPT = ("--data.prompts_per_rollout=1",)
LARGER_LORA = ("--model.policy.lora.rank=64", "--model.policy.lora.alpha=128")
METHODS = {
    "trajectory GRPO-SD3.5-M, a prompt of 24": sd35("grpo_trajectory", *ONE_PROMPT),
    "NFT-SD3.5-M, a prompt of 24": sd35("nft", *ONE_PROMPT),
    "AWM-SD3.5-M, a prompt of 24": sd35("awm", *ONE_PROMPT),
    "RAM-SD3.5-M, a prompt of 24": sd35("ram", *ONE_PROMPT),
    "DGPO-SD3.5-M, a prompt of 24": sd35("dgpo", *ONE_PROMPT, *LARGER_LORA),
    "CRD-SD3.5-M, a prompt of 24": sd35("crd", *ONE_PROMPT, "--model.reference_guidance_scale=4.5"),
    "OPSD-SD3.5-M, 144 prompts": config("align/opsd_sd35"),
    "on-policy distillation-SD3.5-M, 24 prompts": sd35("opd", "--model.prompts_at_once=24"),
    "ReFL to a state-SD3.5-M": sd35("refl_state", *LARGER_LORA, "--model.guidance_scale=1.0", side=1024),
    "PRFL-SD3.5-M": sd35("prfl", *LARGER_LORA),
}
"""Methods since the papers, at 512² but for ReFL to a state."""
TINY_REWARDS = {
    name: [*config(f"model/{name}", "data/tinyworld_pickapic", "trainer/cpu"), "--data.batch_size=2"]
    for name in ("lrm_tiny", "dina_lrm_tiny")
}
FEW = ("--data.batch_size=2", "--data.prompts_per_rollout=2", "--model.sampling.num_inference_steps=3")
TINY_ALIGNMENT = {
    "lpo_tiny": [*config("align/lpo_tiny"), *KEEP_ALL, *FEW],
    "grpo_stepwise_tiny": [*config("align/grpo_stepwise_tiny"), *FEW],
    "refl_tiny": [*config("align/refl_tiny"), "--data.batch_size=1"],
}
TINY_METHODS = {
    "grpo_trajectory_tiny": [*config("align/grpo_trajectory_tiny"), *FEW],
    "nft_tiny": [*config("align/nft_tiny"), *FEW],
    "awm_tiny": [*config("align/awm_tiny"), *FEW[:2]],
    "ram_tiny": [*config("align/ram_tiny"), *FEW],
    "dgpo_tiny": [*config("align/dgpo_tiny"), *FEW[:2]],
    "crd_tiny": [*config("align/crd_tiny"), *FEW],
    "opsd_tiny": [*config("align/opsd_tiny"), *FEW],
    "opd_tiny": [*config("align/opd_tiny"), *FEW],
    "refl_state_tiny": [*config("align/refl_state_tiny"), "--data.batch_size=1"],
    "prfl_tiny": config("align/prfl_tiny"),
}
SMALL_CARD = 40e9
"""Bytes of memory below which a card trains on batches of one."""
PEAKS = {"ReFL-SD3.5-M, 1024²": 19.4}
"""Step → paper's peak in GB."""


def print_steps(title: str, steps: dict[str, list[str]], setting: Setting) -> None:
    """Print a table of training steps."""
    if setting.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < SMALL_CARD:
        title, steps = f"{title}; batches of 1", {name: [*one, "--data.batch_size=1"] for name, one in steps.items()}
    works = {name: partial(step_row, name, options, setting, PEAKS.get(name)) for name, options in steps.items()}
    table(title, STEP_COLUMNS, guarded(STEP_COLUMNS, works, setting))


def block_rewards(setting: Setting) -> None:
    """Print the table of the training steps of reward models."""
    print_steps("Training steps of reward models", TINY_REWARDS if setting.tiny else REWARDS, setting)


def block_alignment(setting: Setting) -> None:
    """Print the table of the training steps of alignment."""
    print_steps("Training steps of alignment", TINY_ALIGNMENT if setting.tiny else ALIGNMENT, setting)


def block_methods(setting: Setting) -> None:
    """Print the table of the training steps of methods since the papers."""
    print_steps("Training steps of methods since the papers", TINY_METHODS if setting.tiny else METHODS, setting)


def block_execution(setting: Setting) -> None:
    """Print the table of ways to run one training step."""
    if setting.tiny:
        base, plain = TINY_REWARDS["dina_lrm_tiny"], "32-true"
    else:
        base, plain = [*config("recipes/dina_lrm_sd35"), "--data.size=512"], "bf16-mixed"
    ways = {
        "float32": ["--trainer.precision=32-true", "--model.backbone.frozen_dtype=float32"],
        plain: [],
        f"{plain}, checkpointing": ["--model.backbone.gradient_checkpointing=true"],
    }
    steps = {name: [*base, *options] for name, options in ways.items()}
    print_steps("Ways to run one step of DiNa-LRM, 4 pairs of 512²", steps, setting)


# --- switches ------------------------------------------------------------------------------------------------------


def use_channels_last(step: Step) -> None:
    """Store the weights of convolutions with channels last."""
    step.module.to(memory_format=torch.channels_last)


def use_cudnn_benchmark(step: Step) -> None:
    """Let cuDNN time its convolution algorithms once for each shape."""
    torch.backends.cudnn.benchmark = True


def use_fused_optimizer(step: Step) -> None:
    """Update all weights in a few kernels."""
    for group in step.optimizer.param_groups:
        group["foreach"], group["fused"] = False, True


def use_fused_lora(step: Step) -> None:
    """Add the products of LoRA to the outputs of their layers in one kernel."""
    fuse_lora(step.module)


def use_tf32(step: Step) -> None:
    """Multiply float32 matrices in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


Switch = Callable[[Step], None]
SWITCHES: dict[str, tuple[Switch, ...]] = {
    "channels_last": (use_channels_last,),
    "cudnn.benchmark": (use_cudnn_benchmark,),
    "fused optimiser": (use_fused_optimizer,),
    "TF32": (use_tf32,),
    "fused LoRA": (use_fused_lora,),
    "all five": (use_channels_last, use_cudnn_benchmark, use_fused_optimizer, use_tf32, use_fused_lora),
}
SWITCHED = {
    "LRM-SD1.5, 16 pairs of 512²": REWARDS["LRM-SD1.5, 16 pairs of 512²"],
    "LPO-SD1.5, 10 pairs of 512²": ALIGNMENT["LPO-SD1.5, 10 pairs of 512²"],
    "DiNa-LRM, 4 pairs of 512²": [*config("recipes/dina_lrm_sd35"), "--data.size=512"],
    "trajectory GRPO-SD3.5-M, a prompt of 24": METHODS["trajectory GRPO-SD3.5-M, a prompt of 24"],
}
TINY_SWITCHED = {"lrm_tiny": TINY_REWARDS["lrm_tiny"], "lpo_tiny": TINY_ALIGNMENT["lpo_tiny"]}
SWITCH_COLUMNS = ("step", "batch's rollout, s", "training step, s", "first step, s", "peak, GB", "shipped / this")


def switch_rows(name: str, options: Sequence[str], setting: Setting) -> Iterator[Row]:
    """Yield the rows of one training step: as shipped, with each switch alone, and with all."""
    shipped: dict[str, Spread] = {}
    for way, switches in {"as shipped": (), **SWITCHES}.items():
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True  # PyTorch's own values
        step = Step(options, setting)
        try:
            for switch in switches:
                switch(step)
            step.make_batch()
            first = seconds(step.train)
            step.batch = None
            made = Spread([seconds(step.make_batch)], ".3f")
            step.train()  # a second one, for what the first rollout or an optimiser's state compiles
            taken = Spread([seconds(step.train) for _ in range(setting.repeats)], ".3f")
            peak = peak_of(step.train, setting.device)
        finally:
            step.close()
        shipped.setdefault("step", taken)
        gain = f"{shipped['step'].median / taken.median:.2f}"
        yield [f"{name}, {way}", made, taken, f"{first:.1f}", gigabytes(peak), gain]
        del step
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()


def block_switches(setting: Setting) -> None:
    """Print the table of settings of PyTorch that a training step can be run with."""
    steps = TINY_SWITCHED if setting.tiny else SWITCHED
    works = {name: partial(switch_rows, name, one, setting) for name, one in steps.items()}
    table("Switches of PyTorch, in one process each", SWITCH_COLUMNS, guarded(SWITCH_COLUMNS, works, setting))


# --- performance: auto ---------------------------------------------------------------------------------------------

COMPILED = {
    **SWITCHED,
    "NFT-SD3.5-M, a prompt of 24": METHODS["NFT-SD3.5-M, a prompt of 24"],
    "NFT-SD3.5-M, no checkpointing": [
        *METHODS["NFT-SD3.5-M, a prompt of 24"],
        "--model.policy.gradient_checkpointing=false",
    ],
    "DiNa-LRM-SD3.5-M, 4 pairs of 1024²": REWARDS["DiNa-LRM-SD3.5-M, 4 pairs of 1024²"],
    "LRM-SDXL, 4 pairs of 1024²": REWARDS["LRM-SDXL, 4 pairs of 1024²"],
    "ReFL-SD3.5-M, 1024²": ALIGNMENT["ReFL-SD3.5-M, 1024²"],
    "PRFL-SD3.5-M": METHODS["PRFL-SD3.5-M"],
}
TINY_COMPILED = TINY_SWITCHED | {"nft_tiny": TINY_METHODS["nft_tiny"]}
COMPILED_COLUMNS = (
    "step", "compilation, s", "rollout, s", "step, s", "peak, GB", "eager: rollout, s", "step, s", "peak, GB",
    "rollout eager / this", "step eager / this", "TFLOP/s",
)  # fmt: skip


def timed(step: Step) -> tuple[Spread, Spread, float]:
    """Return the seconds of a rollout and of steps of which all that is made once is made, and the peak."""
    made = Spread([seconds(step.make_batch)], ".3f")
    step.train()
    taken = Spread([seconds(step.train) for _ in range(step.setting.repeats)], ".3f")
    return made, taken, peak_of(step.train, step.setting.device)


def compiled_row(name: str, options: Sequence[str], setting: Setting) -> Iterator[Row]:
    """Yield the row of one training step, eager and then with the switches that ``performance`` sets on a GPU."""
    step = Step(options, setting)
    try:
        costs = step.estimate()
        step.make_batch()
        step.train()
        eager = timed(step)
        Performance(compile_blocks=True).apply(step.module)

        def compile_all() -> None:
            step.make_batch()
            step.train()
            step.train()

        first = seconds(compile_all)
        this = timed(step)
    finally:
        step.close()
    work = (costs.forward + costs.backward) / TERA
    gains = [f"{before.median / after.median:.2f}" for before, after in zip(eager[:2], this[:2], strict=True)]
    cells = [*this[:2], gigabytes(this[2]), *eager[:2], gigabytes(eager[2]), *gains]
    yield [name, f"{first:.0f}", *cells, f"{work / this[1].median:.0f}"]


def block_performance(setting: Setting) -> None:
    """Print the table of training steps with what ``performance`` switches on by itself, beside eager ones."""
    steps = TINY_COMPILED if setting.tiny else COMPILED
    works = {name: partial(compiled_row, name, one, setting) for name, one in steps.items()}
    title = "Training steps with compiled blocks, and eager with the same weights"
    table(title, COMPILED_COLUMNS, guarded(COMPILED_COLUMNS, works, setting))


# --- families ------------------------------------------------------------------------------------------------------


def rows_of_family(model: str, setting: Setting) -> Iterator[Row]:
    """Yield a row for reward and policy of a model."""
    for name, work in family_rows(model, setting.device, setting.dtype, setting.tiny):
        with setting.autocast():
            work()
            spent = Spread([seconds(work) for _ in range(setting.repeats)], ".4f")
            peak = peak_of(work, setting.device)
            counted = flops(work)
        del work  # and the network in it, before the next one is made
        yield [name, spent, f"{counted / TERA:.2f}", f"{counted / TERA / spent.median:.0f}", gigabytes(peak)]


def block_families(setting: Setting) -> None:
    """Print the table of all families."""
    columns = ("model and work", "s", "TFLOP", "TFLOP/s", "peak, GB")
    works = {model: partial(rows_of_family, model, setting) for model in MODELS}
    title = "One 1024² latent of every family: reward on half of the blocks, checkpointed step of the policy; bfloat16"
    table(title, columns, guarded(columns, works, setting))


# --- blocks --------------------------------------------------------------------------------------------------------

BLOCKS = {
    "scoring": block_scoring,
    "vlm": block_vlm,
    "rewards": block_rewards,
    "alignment": block_alignment,
    "methods": block_methods,
    "execution": block_execution,
    "switches": block_switches,
    "performance": block_performance,
    "families": block_families,
}


def measure(name: str, path: Path, device: str, tiny: bool) -> None:
    """Measure one block, and write its file after each row."""
    began, first = time.perf_counter(), len(TABLES)

    def write(complete: bool = False) -> None:
        facts = {**circumstances(), "block": name, "device": device, "tiny": tiny, "complete": complete}
        tables = [one.entries() for one in TABLES[first:]]
        found = {**facts, "seconds": round(time.perf_counter() - began), "tables": tables}
        write_file(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    torch.manual_seed(0)
    BLOCKS[name](Setting(device, tiny, 1 if tiny else 5, write))
    write(complete=True)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    measure(sys.argv[1], Path(sys.argv[2]), sys.argv[3], tiny="tiny" in sys.argv[4:])
