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

from latentreward.alignment import Policy, PolicySource, RewardSource
from latentreward.core.contracts import (
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
from latentreward.core.promises import keep_promise, unchanged
from latentreward.core.running import evaluating
from latentreward.data import PairReader
from latentreward.diffusion import DiffusionBackbone
from latentreward.diffusion.backbones.base import rows_of
from latentreward.reward import ImageScorer, PreferenceLoss, RewardHead
from latentreward.reward.scoring.apart import EXACT, check_apart, check_equal, check_predictions

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
    check_apart(backbone, head, latents, timesteps, text, None, shipped=True)


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
