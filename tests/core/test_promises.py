"""Faulty parts of a user's own: each is refused in one line that names class and method, and the sound ones are not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from latentreward.alignment import (
    Advantage,
    Penalty,
    RatioRule,
    Reward,
    RewardLoss,
    RewardSource,
    StepChoice,
    StepDPOResult,
    StepDrift,
    StepPairLoss,
    Window,
)
from latentreward.core.contracts import (
    Conditioning,
    ImageRef,
    LatentSpace,
    NoisyStates,
    PairScores,
    PreferencePair,
)
from latentreward.core.errors import InputError
from latentreward.data import PairReader
from latentreward.diffusion import (
    DDPM,
    DiffusionBackbone,
    Family,
    FlowMatching,
    NoiseProcess,
)
from latentreward.diffusion.encoders.prompts import PromptEncoder
from latentreward.diffusion.encoders.vae import LatentEncoder
from latentreward.reward import (
    ImageScorer,
    PreferenceLoss,
    RewardHead,
)
from tests.reward.heads.features import DIT_SPEC, random_features

NAN = float("nan")
FLOW = FlowMatching()
FEATURES = random_features(DIT_SPEC, batch=3)
ONES = torch.ones(3)
SCORES = PairScores(ONES, 0 * ONES, ONES, ONES, ONES, ONES)
DRIFT = StepDrift(ONES, ONES, ONES, torch.tensor(1.0), torch.tensor(1.0))
PROMPTS = ["a cat", "a dog"]
SPACE = LatentSpace(4, 8)
PAIR = PreferencePair("0", "a cat", ImageRef("a", b"a"), ImageRef("b", b"b"), label_a=1.0)
MASK = torch.tensor([[True, True, False], [True, True, True]])
IMAGES = [Image.new("RGB", (8, 8))] * 2


@dataclass
class Kind:
    """A base class, a sound part of it, its use as in a program, and faults: what a method or attribute is instead."""

    base: type
    sound: dict[str, Any]
    use: Callable[[Any], Any]
    faults: list[tuple[str, Any]]
    args: tuple[Any, ...] = ()
    also: dict[str, Any] = field(default_factory=dict)


def returning(value: Any) -> Callable[..., Any]:
    return lambda self, *given, **named: value


def made(kind: Kind, name: str = "", instead: Any = None) -> Any:
    """An object of a class ``Mine``, with a method that returns ``instead``, or with this attribute."""
    methods = {method: value if callable(value) else returning(value) for method, value in kind.sound.items()}
    changed = methods | kind.also
    if name in methods:
        changed[name] = instead if callable(instead) and not isinstance(instead, type) else returning(instead)
    elif name:
        changed[name] = instead
    return type("Mine", (kind.base,), changed)(*kind.args)


def rows(pairs: Sequence[Any]) -> Callable[..., Any]:
    return lambda self, index: pairs[index]


def read_all(reader: PairReader) -> list[Any]:
    return [reader[index] for index in [*range(len(reader)), 0]]  # the first one again, as a second pass would


def labelled(**changes: Any) -> Callable[..., Any]:
    return rows([PAIR, replace(PAIR, **({"pair_id": "1"} | changes))])


def conditioning(*shape: int, pooled: int | None = 6, mask: Tensor | None = None) -> Conditioning:
    return Conditioning(torch.zeros(*shape), None if pooled is None else torch.zeros(2, pooled), mask)


def predicted(family: Family) -> Any:
    latents = torch.zeros(2, 4, 2, 2)
    family.predict(None, latents, torch.ones(2), None, None)
    family.levels(2, (4, 2, 2))
    family.load_prompt_encoder()
    family.load_network()
    return family.guide(latents, latents, 2.0)


class Scoring(Reward):
    def encode_prompts(self, prompts: Any) -> None:
        return None

    def score(self, states: NoisyStates, encoded: Any) -> Tensor:
        return torch.zeros(len(states.latents))


LEAF = torch.zeros(3, 4, 2, 2, requires_grad=True)
STATES = NoisyStates(torch.zeros(3, 4, 2, 2), ONES, torch.zeros(3, dtype=torch.int64))


def both(loss: PreferenceLoss) -> None:
    loss(SCORES)
    loss.win_probability(SCORES)


LENGTH = {"num_tokens": 3, "token_dim": 5, "pooled_dim": 6}
MASKED = LENGTH | {"masked": True, "count_tokens": returning([2, 3])}
SPEC = property(lambda self: DIT_SPEC)

GROUPS = torch.zeros(3, dtype=torch.int64)


def each(name: str, *values: Any) -> list[tuple[str, Any]]:
    return [(name, value) for value in values]


FLAT, WRONG, ZERO = ONES[:, None], NAN * ONES, torch.zeros(2, 4, 2, 2)
KINDS = [
    HEAD := Kind(
        RewardHead,
        {"forward": ONES},
        lambda head: head(FEATURES),
        [*each("forward", FLAT, ONES[:2], WRONG, [1.0] * 3, ONES.long(), None), ("axis_weights", (0.5, 0.5))],
    ),
    LOSS := Kind(
        PreferenceLoss,
        {"per_pair": ONES.double(), "win_probability": ONES / 2},
        both,
        each("per_pair", FLAT, torch.tensor(1.0), WRONG) + each("win_probability", 1.5 * ONES, FLAT, ONES > 0),
    ),
    STEP_LOSS := Kind(
        StepPairLoss,
        {"forward": StepDPOResult(*ONES, ONES[0])},
        lambda loss: loss(ONES, ONES, ONES, ONES),
        each("forward", ONES[0], StepDPOResult(ONES, *ONES)),
    ),
    REWARD_LOSS := Kind(
        RewardLoss, {"forward": torch.tensor(1.0)}, lambda loss: loss(ONES), each("forward", ONES, torch.tensor(NAN))
    ),
    READER := Kind(
        PairReader,
        {"__len__": 2, "__getitem__": labelled()},
        read_all,
        [
            *each(
                "__getitem__",
                labelled(label_a=2),
                labelled(label_a="1"),
                labelled(weight=NAN),
                labelled(image_a="a.png"),
                labelled(image_b=replace(PAIR.image_b, holds="latents")),
                None,
            ),
            ("__len__", "2"),
        ],
    ),
    ENCODER := Kind(
        PromptEncoder,
        {"tokenize": (torch.ones(2, 3),), "encode_ids": conditioning(2, 3, 5)},
        lambda encoder: encoder(PROMPTS),
        [
            *each(
                "encode_ids",
                (torch.zeros(2, 3, 5),),
                conditioning(2, 3, 4),
                conditioning(2, 3, 5, pooled=None),
                conditioning(2, 3, 5, mask=MASK),
                Conditioning(NAN * torch.zeros(2, 3, 5), torch.zeros(2, 6)),
            ),
            ("masked", True),
            ("tokenize", (torch.ones(1, 3),)),
        ],
        also=LENGTH,
    ),
    Kind(
        PromptEncoder,
        {"tokenize": (torch.ones(2, 3),), "encode_ids": conditioning(2, 3, 5, mask=MASK)},
        lambda encoder: encoder(PROMPTS),
        [("encode_ids", conditioning(2, 3, 5, mask=mask)) for mask in (None, MASK.float(), MASK & False, MASK.flip(1))]
        + [("count_tokens", returning([3, 3])), ("masked", False)],
        also=MASKED,
    ),
    Kind(
        LatentEncoder,
        {"encode": ZERO, "decode": torch.zeros(2, 3, 16, 16)},
        lambda vae: vae.decode(vae.encode(torch.zeros(2, 3, 16, 16))),
        each("encode", torch.zeros(2, 5, 2, 2), NAN * ZERO) + each("decode", torch.zeros(2, 3, 8, 8), None),
        args=(nn.Linear(1, 1), SPACE),
    ),
    BACKBONE := Kind(
        DiffusionBackbone,
        {"read": FEATURES, "blocks": ()},
        lambda backbone: backbone(torch.zeros(3, 4, 2, 2), ONES, None),
        [
            *each(
                "read",
                (ONES,),
                replace(FEATURES, visual=(torch.zeros(3, 16, 15),) * 3),
                replace(FEATURES, visual_grids=((3, 3),) * 3),
                replace(FEATURES, temb=NAN * FEATURES.temb),
                replace(FEATURES, text=()),
                replace(FEATURES, output=torch.zeros(3, 4, 2, 2)),
            ),
        ],
        args=(FLOW, SPACE),
        also={"feature_spec": SPEC},
    ),
    Kind(
        NoiseProcess,
        dict.fromkeys(("add_noise", "target", "clean"), torch.zeros(3, 4, 2, 2)),
        lambda process: process.add_noise(torch.zeros(3, 4, 2, 2), torch.ones(3, 4, 2, 2), ONES),
        each("add_noise", torch.zeros(3, 4), torch.full((3, 4, 2, 2), NAN))
        + each("sigmas", torch.tensor([1.5, 0.0]), torch.zeros(3)),
        also={
            "timesteps": torch.tensor([1000.0, 0.0]),
            "sigmas": torch.tensor([1.0, 0.0]),
            "from_config": classmethod(lambda *_: None),
        },
    ),
    Kind(
        Family,
        {
            "predict": ZERO,
            "levels": (torch.tensor([1000.0, 500.0]), torch.tensor([1.0, 0.5, 0.0])),
            "blocks": (),
            "load_prompt_encoder": lambda self, *given, **named: made(ENCODER),
            "load_network": lambda self, *given, **named: nn.Linear(1, 1),
            "guide": ZERO,
        },
        predicted,
        each("predict", torch.zeros(2, 4, 2), NAN * ZERO)
        + each("levels", ONES, (ONES[:2], 1.2 * ONES))
        + [("levels", (torch.tensor([500.0, 1000.0]), torch.tensor([0.5, 1.0, 0.0])))]
        + [("load_prompt_encoder", None), ("load_network", None), ("guide", ZERO[:1]), ("clips", True)]
        + [("noise_process", DDPM(torch.linspace(0.9, 0.1, 1000)))],
        args=(None,),
        also={
            "recognises": classmethod(lambda *_: True),
            "native_size": (8, 8),
            "noise_process": FLOW,
            "default_guidance": None,
            "lora_loader": "",
            "latent_space": SPACE,
            "network_class": "",
        },
    ),
    Kind(
        Advantage, {"__call__": ONES}, lambda rule: rule(ONES, GROUPS), each("__call__", FLAT, WRONG, None, ONES.long())
    ),
    WINDOW := Kind(
        Window,
        {"start": 2},
        lambda window: (window.check(4), window.start(4, 0, torch.Generator())),
        each("start", -1, 3, 2.0) + each("size", 0),
        also={"size": 2},
    ),
    RATIO := Kind(
        RatioRule,
        {"objective": (ONES, ONES, ONES > 0)},
        lambda rule: rule.objective(ONES, ONES, 0.2, DRIFT),
        each("objective", ONES, (FLAT, ONES, ONES > 0), (WRONG, ONES, ONES > 0), (ONES, ONES, ONES)),
    ),
    PENALTY := Kind(
        Penalty,
        {"penalty": torch.tensor(1.0)},
        lambda rule: rule.penalty(ONES, ONES),
        each("penalty", ONES, torch.tensor(NAN), 1.0),
    ),
    Kind(
        StepChoice,
        {"choose": torch.tensor([0, 2])},
        lambda rule: rule.choose(4, torch.Generator()),
        each("choose", torch.tensor([1, 1]), torch.tensor([0, 4]), ONES, [0], GROUPS[:0]),
    ),
    REWARD := Kind(
        Reward,
        {"encode_prompts": None, "score": ONES, "score_clean": ONES},
        lambda reward: (reward(STATES, None), reward.score_clean(STATES.latents, rows=STATES.rows, encoded=None)),
        each("score", FLAT, torch.tensor(1.0), WRONG, [1.0] * 3) + each("score_clean", FLAT, WRONG),
    ),
    Kind(
        RewardSource,
        {"load": lambda self, policy: Scoring(), "latent_space": None, "scores_states": True},
        lambda source: (source.latent_space(), source.load(None)),
        [("load", lambda self, policy: nn.Linear(1, 1)), ("latent_space", 4)],
    ),
    Kind(
        ImageScorer,
        {"identity": "mine", "score": ONES[:2]},
        lambda scorer: (scorer.identity(), scorer(PROMPTS, IMAGES)),
        [("identity", None), *each("score", ONES[:2, None], WRONG[:2], ONES)],
        args=("Mine",),
    ),
]
FAULTS = [
    pytest.param(kind, *fault, id=f"{kind.base.__name__}-{fault[0]}-{number}")
    for kind in KINDS
    for number, fault in enumerate(kind.faults)
]


@pytest.mark.parametrize(("kind", "name", "instead"), FAULTS)
def test_a_faulty_part_is_named_in_one_line(kind: Kind, name: str, instead: Any) -> None:
    with pytest.raises(InputError) as caught:
        kind.use(made(kind, name, instead))
    line = str(caught.value)
    assert ("Mine" in line or "window.size" in line) and "\n" not in line and len(line) < 300, line


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.base.__name__)
def test_a_sound_part_is_taken(kind: Kind) -> None:
    kind.use(made(kind))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.base not in (RewardLoss, LatentEncoder)])
def test_a_missing_method_is_named_with_its_base(kind: Kind) -> None:
    half = type("Half", (kind.base,), {})
    with pytest.raises(InputError, match=r"^Half lacks .* of ") as caught:
        half(*kind.args)
    assert all(name in str(caught.value) for name in half.__abstractmethods__)


def test_the_first_call_is_compared_and_nothing_through_super() -> None:
    results = [ONES, ONES[:, None]]
    head = made(HEAD, "forward", lambda self, features: results.pop(0))
    assert head(FEATURES).shape == (3,) and head(FEATURES).shape == (3, 1)
    inner = type(made(HEAD, "forward", ONES[:, None]))
    outer = type("Outer", (inner,), {"forward": lambda self, features: inner.forward(self, features).squeeze(-1)})
    assert outer()(FEATURES).shape == (3,)


def with_gradient(margin: Tensor) -> PairScores:
    return replace(SCORES, chosen=margin)


MARGIN = torch.ones(3, requires_grad=True)
DETACHED: list[tuple[Kind, str, Any, Callable[[Any], Any]]] = [
    (HEAD, "forward", lambda self, _: ONES, lambda head: head(replace(FEATURES, visual=(MARGIN,) * 3))),
    (LOSS, "per_pair", lambda self, s: s.margin.detach(), lambda loss: loss(with_gradient(MARGIN))),
    (LOSS, "forward", lambda self, s: s.margin.detach().mean(), lambda loss: loss(with_gradient(MARGIN))),
    (REWARD_LOSS, "forward", lambda self, r: r.detach().mean(), lambda loss: loss(MARGIN)),
    (
        STEP_LOSS,
        "forward",
        lambda self, *r: StepDPOResult(*ONES, ONES[0]),
        lambda loss: loss(MARGIN.mean(), *[ONES[0]] * 3),
    ),
    (PENALTY, "penalty", lambda self, p, r: p.detach().mean(), lambda rule: rule.penalty(MARGIN, ONES)),
    (RATIO, "objective", lambda self, r, *_: (ONES, ONES, ONES > 0), lambda r: r.objective(MARGIN, ONES, 0.2, DRIFT)),
    (REWARD, "score", lambda self, *_: ONES, lambda reward: reward(replace(STATES, latents=LEAF), None)),
    (REWARD, "score_clean", returning(ONES), lambda reward: reward.score_clean(LEAF, STATES.rows, None)),
]


@pytest.mark.parametrize(
    ("kind", "name", "method", "use"), DETACHED, ids=[f"{k.base.__name__}-{n}" for k, n, *_ in DETACHED]
)
def test_a_result_without_a_gradient_is_named(kind: Kind, name: str, method: Any, use: Callable[[Any], Any]) -> None:
    also = kind.also | {"differentiable": True}
    part = made(Kind(kind.base, kind.sound | {name: method}, kind.use, [], kind.args, also))
    with torch.no_grad():
        use(part)
    with pytest.raises(InputError, match=r"Mine\b.* returned a tensor without a gradient; it must be computed by"):
        use(part)
