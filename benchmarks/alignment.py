"""Measure the costs of alignment: forward passes, memory, rewards and rollouts; prints Markdown tables.

Usage: ``python benchmarks/alignment.py [PART ...] [--repeats 5] [--batch 4] [--threads 1]``. By default all parts
run, which takes about ten minutes. Weights are random, because only shapes and times matter. ``gpu.py`` measures a GPU.

``passes``   time of LPO's optimisation with one policy pass and one reference pass per pair, against two of each (mid
             size)
``weights``  weights in memory against three copies of the network (mid size, and full sizes on the meta device)
``scoring``  a reward on latents against predicting x̂_0, VAE decoder and CLIP-H: FLOPs at full size, time at mid size
``rollout``  share of rollouts in the time of LPO's training (mid size)
``vlm``      FLOPs of DiNa-LRM against a Qwen2-VL-7B scorer of decoded 1024² images (DiNa-LRM counted, Qwen by formula)
"""

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from measuring import TERA, Goal, Spread, flops, interleaved, ratio, seconds, table
from random_pipelines import (
    RandomLatentReward,
    RandomPolicy,
    materialise,
    prompts_for,
    random_states,
)
from torch import Tensor, nn

from latentreward.alignment import POLICY, LPOModule, Policy, QuantileThreshold, Reward, Sampling, StepDPOResult
from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.alignment.rewards.shared_base import REWARD
from latentreward.apps.estimate.pipelines import CLIP_MODELS
from latentreward.core.contracts import NoisyStates, PromptBatch, StepPairs
from latentreward.diffusion import LoRA

PARTS = ("passes", "weights", "scoring", "rollout", "vlm")


def lpo_module(size: str, share: bool, guidance_scale: float = 1.0, **policy: Any) -> LPOModule:
    """Return an LPO module with random weights at ``size``, whose text encoders cost no time and memory."""
    source = RandomPolicy(source=size, lora=LoRA(rank=4, alpha=4.0), **policy)
    module = LPOModule(
        source,
        RandomLatentReward(size, share),
        QuantileThreshold(0.0),
        guidance_scale=guidance_scale,
        seed=0,
    )
    replace_prompts(size, module.policy, module.reward)
    return module


def replace_prompts(size: str, policy: Policy, reward: LatentScorer, device: torch.device | str = "cpu") -> None:
    """Replace the text encoders of policy and reward by precomputed embeddings, which cost no time and memory."""
    policy.text_encoder = reward.model.backbone.text_encoder = prompts_for(size).to(device)


def random_pairs(module: LPOModule, count: int) -> StepPairs:
    """Sample pairs at the middle step from the policy's own transition, where the loss clamps no ratio."""
    device = module.device
    timesteps = module.sampler.timesteps[[len(module.sampler) // 2] * count]
    latents = random_states(module.policy, count, device)
    prompts = tuple(f"prompt {number}" for number in range(count))
    conditioning, uncond = module.conditioning(prompts)
    with torch.no_grad():
        output = module.policy.predict_guided(
            latents, timesteps.to(device), conditioning, uncond, module.guidance_scale
        )
        step = module.sampler.transition(latents, output, timesteps)
    noise = torch.randn(2, *latents.shape, generator=torch.Generator().manual_seed(1)).to(device)
    chosen, rejected = step.sample(noise)
    return StepPairs(
        prompts, prompts, latents, timesteps.to(device), chosen, rejected, torch.ones(count, device=device)
    )


# --- one pass of each model instead of two -------------------------------------------------------------------------


def two_passes(module: LPOModule, batch: StepPairs) -> StepDPOResult:
    """Compute LPO's loss like the released loop: one policy and one reference pass for each side of the pair."""

    def both(states: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), module.policy.reference():
            reference = module.transition(batch)
        return module.transition(batch).log_prob(states), reference.log_prob(states)

    (chosen, ref_chosen), (rejected, ref_rejected) = both(batch.chosen), both(batch.rejected)
    return module.loss(chosen, rejected, ref_chosen, ref_rejected)


def adapter_gradients(module: LPOModule, loss: Tensor) -> list[Tensor]:
    """Return the gradients of the policy's adapter."""
    weights = [p for name, p in module.policy.named_parameters() if f".{POLICY}." in name and p.requires_grad]
    return list(torch.autograd.grad(loss, weights))


def measure_passes(size: str, batch: int, repeats: int) -> None:
    """Print the times of forward and backward pass, and the differences of loss and gradients."""
    rows = []
    for guidance in (1.0, 5.0):
        module = lpo_module(size, share=True, guidance_scale=guidance)
        pairs = random_pairs(module, batch)
        one, two = module.compare(pairs)[0].loss, two_passes(module, pairs).loss
        first, second = adapter_gradients(module, one), adapter_gradients(module, two)
        error = max(float((a - b).norm()) for a, b in zip(first, second, strict=True))
        # relative to the largest gradient, because some gradients consist of rounding errors alone
        error /= max(float(gradient.norm()) for gradient in second)
        times = interleaved(
            {
                "one": lambda module=module, pairs=pairs: adapter_gradients(module, module.compare(pairs)[0].loss),
                "two": lambda module=module, pairs=pairs: adapter_gradients(module, two_passes(module, pairs).loss),
            },
            repeats,
        )
        gain = ratio(times["two"], times["one"])
        rows.append(
            [
                f"{guidance:g}",
                times["one"],
                times["two"],
                gain,
                Goal(gain.median, least=1.9),
                f"{abs(float(one.detach() - two.detach())):.1e}",
                f"{error:.1e}",
            ]
        )
    columns = ("guidance", "1 + 1, s", "2 + 2, s (our rewrite of the released loop)", "ratio", "goal")
    title = f"Optimisation of LPO, {size} size, {batch} pairs, LoRA policy"
    table(title, (*columns, "difference of the loss", "of gradients, to the largest"), rows)


# --- weights in memory ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters of the parts of an alignment run; a shared parameter is counted once."""

    network: int
    reward: int
    adapters: int
    text: int
    vae: int

    @classmethod
    def of(cls, module: LPOModule, text: nn.Module | None) -> "Weights":
        """Count the parameters of a module and, if given, of a text encoder."""
        adapters, network, reward, vae = set[int](), set[int](), set[int](), set[int]()
        sizes: dict[int, int] = {}
        for part, names in ((module.policy.network, network), (module.policy.vae, vae), (module.reward, reward)):
            for name, weight in part.named_parameters():
                sizes[id(weight)] = weight.numel()
                (adapters if f".{POLICY}." in name or f".{REWARD}." in name else names).add(id(weight))
        reward -= network | adapters
        sums = (sum(sizes[one] for one in names) for names in (network, reward, adapters))
        text_size = 0 if text is None else sum(weight.numel() for weight in text.parameters())
        return cls(*sums, text_size, sum(sizes[one] for one in vae))


def count_weights(size: str, share: bool, device: str) -> Weights:
    """Build an alignment run on ``device``, and count its parameters."""
    with torch.device(device):
        source = RandomPolicy(source=size)
        module = LPOModule(source, RandomLatentReward(size, share), QuantileThreshold(0.0), seed=0)
        return Weights.of(module, module.policy.text_encoder)


def measure_weights(sizes: Sequence[tuple[str, str]]) -> None:
    """Print the weights in memory against three copies of the network (policy, reference and reward)."""

    def rows() -> Iterator[list[str]]:
        for size, device in sizes:
            for share, goal in ((True, 0.36), (False, 0.50)):
                found = count_weights(size, share, device)
                part = (found.network + found.reward) / (3 * found.network)
                millions = [found.network, found.reward, 3 * found.network, found.adapters, found.text, found.vae]
                kind = "adapter" if share else "full LRM"
                yield [size, kind, *(f"{n / 1e6:.1f}" for n in millions), f"{part:.3f}", Goal(part, most=goal)]

    columns = ("size", "reward", "network, M", "reward's own, M", "three copies, M")
    apart = ("apart: adapters, M", "text encoders, M", "VAE, M")
    table("Weights in memory, against three copies of the network", (*columns, *apart, "ratio", "goal"), rows())


# --- scoring one step ----------------------------------------------------------------------------------------------


class Scoring:
    """Parts of scoring one sampling step, one method each.

    Args:
        size: Size of the policy and its latent reward (LRM, or DiNa-LRM on SD3.5).
        count: Number of noisy states.
        device: Device; ``meta`` to count FLOPs.
        guidance: Guidance of LRM's visual feature enhancement.
        dtype: Type of the weights.
    """

    def __init__(
        self,
        size: str,
        count: int,
        device: str = "cpu",
        guidance: float = 7.5,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        with torch.device("meta"):
            self.policy = RandomPolicy(source=size).load().eval()
            self.reward = RandomLatentReward(size, guidance=guidance).load(self.policy).eval()
        replace_prompts(size, self.policy, self.reward, device)
        if device != "meta":
            materialise(nn.ModuleList([self.policy, self.reward]), device, dtype)
        with torch.device(device):
            self.latents = random_states(self.policy, count, device)
            self.timesteps = torch.full((count,), 501.0, device=device)
            self.rows = torch.zeros(count, dtype=torch.int64, device=device)
            self.encoded = self.reward.encode_prompts(["a"])
            self.conditioning = self.policy.encode_prompts(["a"]).select([0] * count)
            self.uncond = self.policy.encode_uncond()

    @torch.no_grad()
    def lrm(self) -> None:
        """Score the latents by the LRM."""
        self.reward(NoisyStates(self.latents, self.timesteps, self.rows), self.encoded)

    @torch.no_grad()
    def prediction(self) -> None:
        """Compute the policy's guided prediction, from which x̂_0 follows."""
        self.policy.predict_guided(self.latents, self.timesteps, self.conditioning, self.uncond, 5.0)

    @torch.no_grad()
    def decoding(self) -> None:
        """Decode the latents by the VAE."""
        assert self.policy.vae is not None
        self.policy.vae.decode(self.latents)


def clip_h(device: str, dtype: torch.dtype = torch.float32, layers: int = 32) -> Callable[[int], None]:
    """Return a function that runs CLIP-H's vision tower on N images of 224²."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**CLIP_MODELS["clip_h"]["vision_config"] | {"num_hidden_layers": layers})
        ).eval()
    if device != "meta":
        materialise(tower, device, dtype)

    @torch.no_grad()
    def embed(count: int) -> None:
        tower(torch.zeros(count, 3, 224, 224, device=device, dtype=dtype))

    return embed


@contextmanager
def without_values() -> Iterator[None]:
    """Switch off what the meta device does not support: the check that scores are finite, and autocast."""
    with (
        patch.object(Reward, "checked", lambda self, scores, *given: scores),
        patch.object(torch, "autocast", lambda *args, **options: nullcontext()),
    ):
        yield


def count_scoring(size: str, guidance: float = 7.5) -> dict[str, float]:
    """Count the FLOPs per state of reward, prediction, decoder and CLIP-H."""
    scoring, tower = Scoring(size, 1, "meta", guidance), clip_h("meta")
    with without_values():
        counted = {name: flops(getattr(scoring, name)) for name in ("lrm", "prediction", "decoding")}
    return counted | {"clip_h": flops(lambda: tower(1))}


def measure_scoring(sizes: Sequence[str], timed: str, batch: int, repeats: int) -> None:
    """Print FLOPs at ``sizes``, and times at the size ``timed``."""
    counted = {size: count_scoring(size) for size in dict.fromkeys((*sizes, timed))}

    def counts() -> Iterator[list[str]]:
        for size, work in counted.items():
            lrm, prediction, decoding, tower = (work[n] / TERA for n in ("lrm", "prediction", "decoding", "clip_h"))
            fresh, reused = prediction + decoding, decoding
            ratios = [(fresh + tower) / lrm, (reused + tower) / lrm, fresh / lrm, reused / lrm]
            parts = (f"{n:.3f}" for n in (lrm, prediction, decoding, tower))
            yield [size, *parts, *(f"{n:.2f}" for n in ratios)]

    columns = ("size", "LRM with VFE", "guided prediction", "VAE decoder", "CLIP-H")
    ratios = ("pixels / LRM, fresh x̂_0", "reused x̂_0", "without CLIP-H: fresh", "reused")
    table("Scoring one state, TFLOP (2 · MAC)", (*columns, *ratios), counts())
    scoring, tower = Scoring(timed, batch), clip_h("cpu")
    works = {"lrm": scoring.lrm, "prediction": scoring.prediction, "decoding": scoring.decoding}
    times = interleaved(works, repeats)
    tower(1)
    times["clip_h"] = Spread([seconds(lambda: tower(batch))] * repeats)
    work = counted[timed]

    def timings() -> Iterator[list[str]]:
        for name, parts in (("fresh x̂_0", ("prediction", "decoding")), ("reused x̂_0", ("decoding",))):
            for with_tower in (False, True):
                parts_now = (*parts, "clip_h") if with_tower else parts
                spent = [sum(each) for each in zip(*(times[part].values for part in parts_now), strict=True)]
                share, measured = sum(work[part] for part in parts_now) / work["lrm"], ratio(spent, times["lrm"])
                label = f"{name}{', with CLIP-H' if with_tower else ''}"
                yield [label, f"{share:.1f}", measured, "" if with_tower else Goal(measured.median, least=0.8 * share)]

    table(
        f"Scoring {batch} states, {timed} size: LRM {times['lrm'].median:.3f} s, CLIP-H alone "
        f"{times['clip_h'].median:.3f} s",
        ("pixels against LRM", "counted", "measured, median (range)", "goal"),
        timings(),
    )


# --- rollouts ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def roll_out(module: LPOModule, prompts: PromptBatch) -> None:
    """Do the work of :meth:`LPOModule.roll_out` without a trainer."""
    module.eval()
    module.make_experience(prompts)
    module.train()


def measure_rollout(size: str, batch: int, steps: int, repeats: int) -> None:
    """Print the times of one rollout step and of optimising one pair, and the share of rollouts in training."""
    rows = []
    for share in (True, False):
        module = lpo_module(size, share, guidance_scale=5.0)
        module.sampling = Sampling(num_inference_steps=steps).with_noise()
        module.sampler = module.sampling.sampler(module.policy.family)
        prompts = PromptBatch(tuple(f"prompt {n}" for n in range(batch)), tuple(str(n) for n in range(batch)))
        pairs = random_pairs(module, batch)
        times = interleaved(
            {
                "rollout": lambda module=module, prompts=prompts: roll_out(module, prompts),
                "optimisation": lambda module=module, pairs=pairs: adapter_gradients(
                    module, module.compare(pairs)[0].loss
                ),
            },
            repeats,
        )
        rollout = times["rollout"].median / (batch * steps)
        optimisation = times["optimisation"].median / batch
        shares = [f"{rollout / (rollout + kept * optimisation):.0%}" for kept in (1.0, 0.5, 0.25)]
        rows.append(["adapter" if share else "full LRM", f"{rollout:.3f}", f"{optimisation:.3f}", *shares])
    columns = ("reward", "rollout, s per state", "optimisation, s per pair")
    kept = ("share of rollouts, all pairs used", "half used", "a quarter used")
    table(f"LPO, {size} size, guidance 5, K = 4, {batch} prompts, {steps} steps", (*columns, *kept), rows)


# --- vision-language models ----------------------------------------------------------------------------------------


def qwen2_vl_7b_flops(image_tokens: int = 256, text_tokens: int = 400) -> tuple[float, float]:
    """Compute the FLOPs of Qwen2-VL-7B's vision tower and language model for one image and prompt (arXiv:2409.12191).

    Sizes are those of the published config; an image token is made of 4 patches of 14². Attention in the language
    model is causal, so half of the full attention is counted.
    """
    patches, width, depth = 4 * image_tokens, 1280, 32
    linear = 2 * width**2 * (4 + 8)  # queries, keys, values, output; MLP of ratio 4
    vision = depth * (patches * linear + 4 * patches**2 * width) + patches * 2 * (3 * 2 * 14 * 14) * width
    hidden, inner, kv, layers, tokens = 3584, 18944, 512, 28, image_tokens + text_tokens
    vision += image_tokens * 2 * (5120 * 5120 + 5120 * hidden)
    per_token = 2 * (2 * hidden**2 + 2 * hidden * kv + 3 * hidden * inner)
    return float(vision), float(layers * (tokens * per_token + 2 * tokens**2 * hidden))


@dataclass(frozen=True)
class DiNaWork:
    """FLOPs of DiNa-LRM for one image.

    Attributes:
        backbone: FLOPs of the backbone at one noise level.
        head: FLOPs of the head at one noise level.
        ensemble_head: FLOPs of the head for the ensemble of three noise levels.
        decoding: FLOPs of the VAE decoder.
    """

    backbone: float
    head: float
    ensemble_head: float
    decoding: float


def count_dina(size: str = "sd35") -> DiNaWork:
    """Count the FLOPs of DiNa-LRM on the meta device, at the policy's native image size."""
    with torch.device("meta"), without_values(), torch.no_grad():
        policy = RandomPolicy(source=size).load()
        reward = RandomLatentReward(size).load(policy)
        replace_prompts(size, policy, reward, "meta")
        latents, encoded, model = random_states(policy, 1, "meta"), reward.encode_prompts(["a"]), reward.model
        arguments = (latents, torch.full((1,), 500.0), encoded.conditioning, encoded.uncond)
        features, decoder = model.read(*arguments), policy.vae
        assert decoder is not None
        return DiNaWork(
            flops(lambda: model.read(*arguments)),
            flops(lambda: model.head(features)),
            flops(lambda: model.head.score_ensemble([features] * 3)),
            flops(lambda: decoder.decode(latents)),
        )


def measure_vlm(size: str = "sd35") -> None:
    """Print the FLOPs of DiNa-LRM beside those of a vision-language model that scores the decoded image."""
    work, (vision, language) = count_dina(size), qwen2_vl_7b_flops()
    scorer = vision + language
    parts = f"{vision / TERA:.2f} vision + {language / TERA:.2f} language + {work.decoding / TERA:.2f} decoder"

    def rows() -> Iterator[list[str]]:
        for name, backbone, head in (
            ("one noise level", work.backbone, work.head),
            ("ensemble of 3", 3 * work.backbone, work.ensemble_head),
        ):
            ratios = [(scorer + work.decoding) / backbone, (scorer + work.decoding) / (backbone + head)]
            figures = (f"{backbone / TERA:.2f}", f"{head / TERA:.2f}", *(f"{ratio:.2f}" for ratio in ratios))
            yield [name, *figures, f"{scorer / (backbone + head):.2f}"]

    table(
        "Rewards of one 1024² image, TFLOP; Qwen2-VL-7B with 256 image and 400 text tokens: "
        f"{(scorer + work.decoding) / TERA:.1f} ({parts}); text encoders of DiNa-LRM apart",
        ("DiNa-LRM", "12 blocks", "head", "Qwen2-VL-7B / 12 blocks", "/ with head", "/ with head, no decoder"),
        rows(),
    )


def main() -> None:
    """Run the chosen parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=(*PARTS, []), metavar="PART")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", default="mid", help="of what is timed")
    options = parser.parse_args()
    options.parts = options.parts or PARTS
    warnings.filterwarnings("ignore", message=".*self.log.*")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if "passes" in options.parts:
        measure_passes(options.size, options.batch, options.repeats)
    if "weights" in options.parts:
        measure_weights([(options.size, "cpu"), ("sd15", "meta"), ("sdxl", "meta")])
    if "scoring" in options.parts:
        measure_scoring(("sd15", "sdxl"), options.size, options.batch, options.repeats)
    if "rollout" in options.parts:
        measure_rollout(options.size, options.batch, 4, max(1, options.repeats // 2))
    if "vlm" in options.parts:
        measure_vlm()


if __name__ == "__main__":
    main()
