"""Checks of parts of your own, to be called in their tests: what a base class promises, and rows that stay apart.

Each function raises :class:`~latentreward.core.errors.InputError` with the first promise that is broken. In a run only
the first call of each method of your own parts is compared.
"""

import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentreward.alignment import Policy, PolicySource, RewardSource
from latentreward.core.contracts import (
    Conditioning,
    CrossScores,
    Features,
    FeatureSpec,
    NoisyStates,
    PairScores,
    PairTargets,
    TapSpec,
    map_tensors,
)
from latentreward.core.errors import InputError
from latentreward.core.promises import keep_promise, place_of, unchanged
from latentreward.core.running import evaluating
from latentreward.data import PairReader
from latentreward.diffusion import DiffusionBackbone, Family, NoiseProcess
from latentreward.diffusion.backbones.base import rows_of
from latentreward.reward import ImageScorer, PreferenceLoss, RewardHead

SPEC = FeatureSpec(
    visual=(TapSpec(16, (4, 4)), TapSpec(24, (4, 4))),
    text=(TapSpec(16, (6,)), TapSpec(24, (6,))),
    temb_dim=32,
    pooled_text_dim=16,
    output=TapSpec(4, (8, 8)),
)
"""Features of a small network, with everything that a head may read."""
PROMPTS = ("a red circle", "two small blue squares left of a green triangle", "")
ROWS = 4
EXACT, ROUNDED = 1e-3, 0.05
"""Largest differences as parts of the largest value: of float32 on a CPU and of scores, and of features elsewhere."""


def check_head(make: Callable[[FeatureSpec], RewardHead], spec: FeatureSpec = SPEC) -> None:
    """Check a head: scores, gradients, rows of a batch against each row alone, and weights that are loaded again.

    Args:
        make: Class of the head, or a function that builds one from the features' widths.
        spec: Widths of the features.
    """
    head, generator = make(spec), torch.Generator().manual_seed(0)
    features = _features(spec, generator)
    features = replace(features, uncond=_features(spec, generator)) if head.needs_uncond else features
    with evaluating(head), torch.no_grad():
        scores = _kept(head, "forward", features)
        _kept(head, "score_ensemble", [features, features])
        alone = torch.cat([head(rows_of(features, slice(row, row + 1))) for row in range(ROWS)])
        check_equal(head, "forward", alone, scores, EXACT)
        other = make(spec)
        other.load_state_dict(head.state_dict())
        with evaluating(other):
            check_equal(head, "forward", other(features), scores, EXACT)
    trained = [weight for weight in head.parameters() if weight.requires_grad]
    _kept(head, "forward", features).sum().backward()
    if trained and not any(weight.grad is not None and weight.grad.any() for weight in trained):
        raise InputError(f"{type(head).__name__}.forward gives none of its weights a gradient")


def check_loss(loss: PreferenceLoss, targets: PairTargets | None = None) -> None:
    """Check a loss of pairs: values, gradients, probabilities of exchanged pairs, and pairs of weight 0.

    Args:
        loss: The loss.
        targets: Given values of four pairs, for a loss that compares scores with them.
    """
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(ROWS, generator=generator).requires_grad_() for _ in range(2))
    cross = CrossScores(*torch.randn(2, ROWS, ROWS, generator=generator)) if loss.needs_cross_scores else None
    label, weight = torch.tensor([1.0, 0.5, 0.8, 1.0]), torch.tensor([1.0, 0.5, 2.0, 0.0])
    sigmas = torch.tensor([0.0, 0.3, 0.7, 1.0])
    scores = PairScores(chosen, rejected, label, weight, sigmas, sigmas, cross, targets)
    _kept(loss, "per_pair", scores)
    value = _kept(loss, "forward", scores)
    wins = _kept(loss, "win_probability", scores)
    turned = _kept(loss, "win_probability", replace(scores, chosen=rejected, rejected=chosen, label=1 - label))
    if (wins + turned - 1).abs().max() > EXACT and cross is None and targets is None:
        raise InputError(f"{type(loss).__name__}.win_probability of an exchanged pair is not 1 minus that of the pair")
    value.backward()
    if cross is None and chosen.grad is not None and chosen.grad[-1] != 0:
        raise InputError(f"{type(loss).__name__}: a pair of weight 0 has a gradient")


def check_reader(reader: PairReader, rows: int = 20) -> None:
    """Check a reader: its first rows, the columns that it gives at once, and a copy in another process."""
    found = [_kept(reader, "__getitem__", row) for row in range(min(rows, _kept(reader, "__len__")))]
    labels = [None if math.isnan(label) else label for label in reader.labels().tolist()]
    for name, column, wanted in (
        ("labels", labels, [pair.label_a for pair in found]),
        ("prompts", reader.prompts(), [pair.prompt for pair in found]),
        ("pair_ids", reader.pair_ids(), [pair.pair_id for pair in found]),
        ("a pickled copy's pair_ids", pickle.loads(pickle.dumps(reader)).pair_ids(), [pair.pair_id for pair in found]),
    ):
        if len(column) != len(reader) or list(column[: len(found)]) != wanted:
            raise InputError(f"{type(reader).__name__}: {name} are not those of the rows")
    if len({*reader.pair_ids()}) < len(reader):
        raise InputError(f"{type(reader).__name__}: several rows have one pair_id, which seeds their random numbers")


def check_scorer(scorer: ImageScorer) -> None:
    """Check a score of pictures: its values, and each picture alone against its score in a batch."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (len(PROMPTS), 24, 32, 3), generator=generator, dtype=torch.uint8)
    images = [Image.fromarray(one.numpy()) for one in pixels]
    scorer.prepare()
    _kept(scorer, "identity")
    scores = scorer(PROMPTS, images)
    alone = torch.cat([scorer([prompt], [image]) for prompt, image in zip(PROMPTS, images, strict=True)])
    check_equal(scorer, "score", alone, scores, EXACT)


def check_reward(source: RewardSource, policy: Policy | None = None) -> None:
    """Check a reward of alignment: its scores of noisy states, each state alone, gradients, and states that stay.

    Args:
        source: The reward.
        policy: Loaded policy whose latents are scored; None for the shipped tiny Stable Diffusion.
    """
    policy = policy or PolicySource("sd_tiny").load()
    _kept(source, "latent_space")
    reward, generator = _kept(source, "load", policy), torch.Generator().manual_seed(0)
    latents = torch.randn(ROWS, policy.latent_space.channels, 8, 8, generator=generator)
    clean = torch.randn(latents.shape, generator=generator)
    timesteps = policy.noise_process.timesteps[[0, -1, 0, -1]].float()
    states = NoisyStates(latents.requires_grad_(), timesteps, torch.tensor([0, 1, 2, 0]), clean.requires_grad_())
    encoded = reward.encode_prompts(PROMPTS)
    with unchanged(f"reward {type(source).__name__}", states):
        scores = _kept(reward, "score", states, encoded)
    if source.judges_alone():
        single = [map_tensors(states, partial(torch.narrow, dim=0, start=row, length=1)) for row in range(ROWS)]
        alone = torch.cat([reward.score(state, encoded) for state in single])
        check_equal(reward, "score", alone, scores, EXACT)


def check_backbone(backbone: DiffusionBackbone, latents: Tensor, head: RewardHead) -> None:
    """Check a backbone: its features, and rows of a batch against each row alone.

    Args:
        backbone: The backbone, with its text encoder.
        latents: ``(3, C, ...)`` latents that it takes.
        head: Head that reads its features.
    """
    timesteps = backbone.noise_process.timesteps[[0, -1, 0]].float()
    text = backbone.encode_prompts(PROMPTS)
    with torch.no_grad(), evaluating(backbone):
        _kept(backbone, "read", latents, timesteps, text)
    check_apart(backbone, head, latents, timesteps, text, None)


def check_family(policy: Policy, latents: Tensor) -> None:
    """Check a family of generators: rows of a batch against each row alone, and gradients in all layers.

    Args:
        policy: Loaded policy of the family.
        latents: ``(3, C, ...)`` latents of the family.
    """
    timesteps = policy.noise_process.timesteps[[0, -1, 0]].float()
    text = policy.encode_prompts(PROMPTS)
    with torch.no_grad(), evaluating(policy.network):
        _kept(policy.family, "predict", policy.network, latents, timesteps, text, None)
    check_predictions(policy.family, policy.network, latents, timesteps, text, None)
    # diffusers' mixtures of experts run without gradient in evaluation mode: outputs are right, gradients are not.
    stopped: list[str] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: None if torch.is_grad_enabled() else stopped.append(name))
        for name, layer in policy.network.named_modules()
        if layer._parameters
    ]
    policy.train().family.predict(policy.network, latents, timesteps, text, None)
    for hook in hooks:
        hook.remove()
    if stopped:
        name, more = type(policy.family).__name__, f"{stopped[0]} and {len(stopped) - 1} more layers"
        raise InputError(f"{name}: {more} run without gradient while the policy trains; set train_mode = True in it")


def check_apart(
    backbone: DiffusionBackbone,
    head: RewardHead,
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    uncond: Conditioning | None,
) -> None:
    """Compare two rows of a batch with each row alone, in evaluation mode: features, then scores.

    A row alone has no padding: its text tokens are those of its mask. The rows get timesteps far apart, see
    :func:`far_timesteps`, and padding, see :func:`with_padding`.
    """
    owner = getattr(backbone, "family", backbone)
    timesteps, conditioning = far_timesteps(timesteps, backbone.noise_process), with_padding(conditioning)

    def features(rows: list[int], text: Conditioning) -> Features:
        return backbone(latents[rows], timesteps[rows], text, uncond and uncond.empty_for(rows))

    with torch.no_grad(), evaluating(backbone), evaluating(head):
        both = features([0, 1], conditioning.select([0, 1]))
        among = [rows_of(both, slice(row, row + 1)) for row in (0, 1)]
        tolerance = tolerance_of(*floats_of(both))
        for row in (0, 1):  # a sum over the rows before leaves the first row as it is
            single = features([row], conditioning.select([row]).trimmed())
            for alone, one in zip(*map(floats_of, map(unpadded, (single, among[row]))), strict=True):
                if alone.shape == one.shape:  # text of a backbone without a mask keeps its padding
                    check_equal(owner, "read" if owner is backbone else "velocity", alone, one, tolerance)
        alone = torch.cat([head(unpadded(row).to(torch.float32)) for row in among])
        check_equal(head, "forward", alone, head(both.to(torch.float32)), EXACT)


def check_predictions(
    family: Family, network: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance: float | None
) -> None:
    """Compare a family's predictions for the first and last row of a batch with those of each row alone.

    Rows are given as in :func:`check_apart`.
    """
    ends = [0, len(latents) - 1]
    latents, timesteps = latents[ends], far_timesteps(timesteps[ends], family.noise_process)
    conditioning = with_padding(conditioning.select(ends))
    method = "velocity" if hasattr(family, "velocity") else "predict"
    with torch.no_grad(), evaluating(network):
        both = family.predict(network, latents, timesteps, conditioning, guidance)
        for row in (0, 1):
            text = conditioning.select([row]).trimmed()
            alone = family.predict(network, latents[[row]], timesteps[[row]], text, guidance)
            check_equal(family, method, alone, both[[row]], tolerance_of(both))


def far_timesteps(timesteps: Tensor, process: NoiseProcess) -> Tensor:
    """Return two timesteps: that of the first row, and of the highest and lowest of the process the more distant one.

    Rows of one timestep would not show a network that gives all rows that of the first.
    """
    first, levels = timesteps[0], process.timesteps[[0, -1]].to(timesteps)
    return torch.stack([first, levels[(levels - first).abs().argmax()]])


def with_padding(conditioning: Conditioning) -> Conditioning:
    """Count the last token of each prompt of several tokens as padding, where the prompts have a mask.

    Prompts of equal lengths would not show that padding counts. Tokens after the last one could exceed the number for
    which a network has positions.
    """
    if conditioning.prompt_mask is None:
        return conditioning
    mask = F.pad(conditioning.prompt_mask[:, 1:], (0, 1))
    mask[:, 0] = True
    return replace(conditioning, prompt_mask=mask)


def unpadded(features: Features) -> Features:
    """Return the features of one row with the text tokens of its mask alone, also those of the empty prompt."""
    uncond = features.uncond and unpadded(features.uncond)
    if features.text_mask is None or not features.text_mask.any():
        return replace(features, uncond=uncond)
    kept = features.text_mask[0]
    text = tuple(tap[:, kept] for tap in features.text)
    return replace(features, text=text, text_mask=features.text_mask[:, kept], uncond=uncond)


def floats_of(features: Features) -> list[Tensor]:
    """Return the features that are floating-point tensors."""
    found: list[Tensor] = []
    map_tensors(features, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return [tensor for tensor in found if tensor.is_floating_point()]


def tolerance_of(*found: Tensor) -> float:
    """Return :data:`EXACT` for results that were computed in float32 on a CPU, else :data:`ROUNDED`."""
    return EXACT if {(one.device.type, one.dtype) for one in found} == {("cpu", torch.float32)} else ROUNDED


def check_equal(part: Any, method: str, alone: Tensor, among: Tensor, tolerance: float) -> None:
    """Raise InputError if a method's result for a row ``alone`` is not that ``among`` other rows."""
    alone, among = alone.float(), among.float()
    error, largest = (alone - among).abs().max(), among.abs().max()
    if error > tolerance * largest + 1e-5:
        level = "," if method == "forward" else ", at its own timestep,"
        raise InputError(
            f"{type(part).__name__}.{method} returned values of a row alone that are up to {error:.3g} (of "
            f"{largest:.3g}) away from those of the same row in a batch{place_of(getattr(type(part), method))}; "
            f"compute each row from itself alone{level} without statistics of the batch and text tokens outside the "
            "mask, and draw nothing at random"
        )


def _kept(part: Any, method: str, *given: Any) -> Any:
    """Call a method, and compare what it returns with what its base class promises."""
    result = getattr(part, method)(*given)
    for base in type(part).__mro__:
        if promise := getattr(vars(base).get(method), "promise", None):
            keep_promise(part, method, promise[0], result, part, *given)
    return result


def _features(spec: FeatureSpec, generator: torch.Generator) -> Features:
    def numbers(*shape: int) -> Tensor:
        return torch.randn(ROWS, *shape, generator=generator)

    def taps(specs: Sequence[TapSpec]) -> tuple[Tensor, ...]:
        return tuple(numbers(torch.Size(tap.grid).numel(), tap.width) for tap in specs)

    grids = tuple(tap.grid for tap in spec.visual)
    output = spec.output and numbers(spec.output.width, *spec.output.grid)
    pooled, temb = numbers(spec.pooled_text_dim), numbers(spec.temb_dim)
    return Features(taps(spec.visual), grids, taps(spec.text), pooled, temb, output=output)
