"""Faulty parts of a user's own: each is refused in one line that names class and method, and the sound ones are not."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics import Metric

from latentreward.alignment import (
    Advantage,
    CallableReward,
    Credit,
    KLGate,
    PairSelection,
    Penalty,
    RatioRule,
    Reward,
    RewardLoss,
    RewardSource,
    ScheduledThreshold,
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
    map_tensors,
)
from latentreward.core.errors import InputError
from latentreward.data import PairReader
from latentreward.diffusion import (
    DDPM,
    DiffusionBackbone,
    Family,
    FlowFamily,
    FlowMatching,
    LevelSampler,
    NoiseProcess,
    TargetSigma,
)
from latentreward.diffusion.encoders.prompts import PromptEncoder
from latentreward.diffusion.encoders.vae import LatentEncoder
from latentreward.reward import (
    BradleyTerryLoss,
    CallableScorer,
    EmbeddingHead,
    HTTPScorer,
    ImageSchema,
    ImageScorer,
    PreferenceLoss,
    RemoteServer,
    RewardHead,
    TableScorer,
)
from latentreward.reward.modules.reward import LevelMetrics
from latentreward.reward.scoring.network import RewardNetwork
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
    return type("Mine", (kind.base,), {key: value for key, value in changed.items() if value is not DROPPED})(
        *kind.args
    )


CALLS = count()
"""Numbers of calls, for names that change."""
DROPPED = object()
"""An attribute that a class lacks."""


def rows(pairs: Sequence[Any]) -> Callable[..., Any]:
    return lambda self, index: pairs[index]


def read_all(reader: PairReader) -> list[Any]:
    return [reader[index] for index in [*range(len(reader)), 0]]  # the first one again, as a second pass would


def labelled(**changes: Any) -> Callable[..., Any]:
    return rows([PAIR, replace(PAIR, **({"pair_id": "1"} | changes))])


def conditioning(*shape: int, pooled: int | None = 6, mask: Tensor | None = None) -> Conditioning:
    return Conditioning(torch.zeros(*shape), None if pooled is None else torch.zeros(2, pooled), mask)


def wrong_features(**changes: Any) -> Any:
    return replace(FEATURES, **changes)


def without_super(self: Any) -> None:
    """A constructor that forgets the base class's."""


def early(self: Any) -> None:
    """A constructor that sets a module before it calls the base class's."""
    self.layer = nn.Linear(1, 1)


def noise_of(process: NoiseProcess) -> Any:
    return process.add_noise(torch.zeros(3, 4, 2, 2), torch.ones(3, 4, 2, 2), ONES)


def predicted(family: Family) -> Any:
    latents = torch.zeros(2, 4, 2, 2)
    family.predict(None, latents, torch.ones(2), None, None)
    family.levels(2, (4, 2, 2))
    family.load_prompt_encoder()
    family.load_network()
    return family.guide(latents, latents, 2.0)


def run(family: FlowFamily) -> Any:
    latents = torch.zeros(2, 4, 2, 2)
    return family.velocity(None, latents, ONES[:2], None, None)


def metric_of(metric: Metric) -> Any:
    metrics = LevelMetrics("wrong", [metric])
    metrics.update(SCORES, BradleyTerryLoss())
    return metrics.values()


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


def embedded(head: EmbeddingHead) -> None:
    image, text = head.embed(FEATURES)
    head.similarity(image, text)
    head.similarity_matrix(text, image)
    head(FEATURES)


def chosen(rule: Any) -> None:
    rule.threshold(0, SAMPLER)


class Steps:
    """What a selection reads of a sampler."""

    noise_std = torch.ones(4)

    def __len__(self) -> int:
        return 4


SAMPLER = Steps()
LENGTH = {"num_tokens": 3, "token_dim": 5, "pooled_dim": 6}
MASKED = LENGTH | {"masked": True, "count_tokens": returning([2, 3])}
SPEC = property(lambda self: DIT_SPEC)

HEAD = Kind(
    RewardHead,
    {"forward": ONES},
    lambda head: head(FEATURES),
    [
        ("forward", bad)
        for bad in (
            ONES[:, None],
            torch.ones(3, 64),
            torch.ones(()),
            ONES[:2],
            NAN * ONES,
            [1.0] * 3,
            1.0,
            ONES.long(),
            (ONES,),
            None,
        )
    ]
    + [("outputs", 2), ("axis_weights", (0.5, 0.5))],
)
EMBEDDING = Kind(
    EmbeddingHead,
    {
        "embed": (torch.ones(3, 2), torch.ones(3, 2)),
        "similarity": ONES,
        "similarity_matrix": torch.ones(3, 3),
        "forward": ONES,
    },
    embedded,
    [("similarity", ONES[:, None]), ("similarity_matrix", ONES)],
)
LOSS = Kind(
    PreferenceLoss,
    {"per_pair": ONES.double(), "win_probability": ONES / 2},
    both,
    [
        ("per_pair", bad)
        for bad in (ONES[:, None], torch.tensor(1.0), NAN * ONES, ONES.long(), None, ONES[:2], [1.0] * 3)
    ]
    + [("win_probability", bad) for bad in (1.5 * ONES, -0.1 * ONES, ONES[:, None], NAN * ONES, ONES > 0, None)],
)
STEP_LOSS = Kind(
    StepPairLoss,
    {"forward": StepDPOResult(*ONES, ONES[0])},
    lambda loss: loss(ONES, ONES, ONES, ONES),
    [("forward", bad) for bad in (ONES[0], StepDPOResult(ONES, *ONES), None)],
)
REWARD_LOSS = Kind(
    RewardLoss,
    {"forward": torch.tensor(1.0)},
    lambda loss: loss(ONES),
    [("forward", bad) for bad in (ONES, torch.tensor(NAN), 1.0, ONES[:1])],
)
LEVELS = Kind(
    LevelSampler,
    {"draw": ONES[:1]},
    lambda levels: levels.draw(torch.Generator(), FLOW),
    [
        ("draw", bad)
        for bad in (torch.tensor(1.0), ONES[:2], NAN * ONES[:1], 2000 * ONES[:1], -ONES[:1], ONES[:1].long(), 1.0)
    ],
)
SIGMAS = Kind(
    TargetSigma,
    {"transform": ONES[:1]},
    lambda levels: levels.draw(torch.Generator(), FLOW),
    [("transform", bad) for bad in (1.7 * ONES[:1], -0.2 * ONES[:1], ONES, NAN * ONES[:1], 0.5)],
)
METRIC = Kind(
    Metric,
    {"update": lambda self, chosen, rejected, label: None, "compute": torch.tensor(1.0)},
    metric_of,
    [
        ("update", lambda self, scores: None),
        ("update", lambda self, a, b, c, d: None),
        ("compute", ONES),
        ("compute", {"a": 1}),
    ],
)
READER = Kind(
    PairReader,
    {"__len__": 2, "__getitem__": labelled()},
    read_all,
    [
        ("__getitem__", bad)
        for bad in (
            *(labelled(label_a=label) for label in (2, -1, NAN, "1")),
            *(labelled(weight=w) for w in (-1.0, NAN, float("inf"), "x")),
            labelled(pair_id="0"),
            labelled(pair_id=7),
            labelled(prompt=None),
            labelled(image_a="a.png"),
            labelled(image_b=replace(PAIR.image_b, holds="latents")),
            labelled(image_a=ImageRef("a", data="text")),
            labelled(image_a=ImageRef("a", path="a.png")),
            labelled(image_b=ImageRef(7, data=b"b")),
            lambda self, index: replace(PAIR, pair_id=str(next(CALLS))),
            (PAIR, 1.0),
            None,
        )
    ]
    + [("__len__", -1), ("__len__", "2"), ("__init__", without_super)],
)
ENCODER = Kind(
    PromptEncoder,
    {"tokenize": (torch.ones(2, 3),), "encode_ids": conditioning(2, 3, 5)},
    lambda encoder: encoder(PROMPTS),
    [
        ("encode_ids", bad)
        for bad in (
            (torch.zeros(2, 3, 5),),
            conditioning(2, 5),
            conditioning(2, 3, 4),
            conditioning(1, 3, 5),
            conditioning(2, 4, 5),
            conditioning(2, 3, 5, pooled=4),
            conditioning(2, 3, 5, pooled=None),
            conditioning(2, 3, 5, mask=MASK),
            Conditioning(NAN * torch.zeros(2, 3, 5), torch.zeros(2, 6)),
        )
    ]
    + [
        ("pooled_dim", 0),
        ("masked", True),
        ("tokenize", torch.ones(2, 3)),
        ("tokenize", (torch.ones(1, 3),)),
        ("token_dim", DROPPED),
    ],
    also=LENGTH,
)
MASKED_ENCODER = Kind(
    PromptEncoder,
    {"tokenize": (torch.ones(2, 3),), "encode_ids": conditioning(2, 3, 5, mask=MASK)},
    lambda encoder: encoder(PROMPTS),
    [
        ("encode_ids", conditioning(2, 3, 5, mask=mask))
        for mask in (None, MASK[:, :2], MASK.float(), MASK & False, MASK.flip(1))
    ]
    + [("count_tokens", returning([3, 3])), ("num_tokens", 2), ("masked", False)],
    also=MASKED,
)
VAE = Kind(
    LatentEncoder,
    {"encode": torch.zeros(2, 4, 2, 2), "decode": torch.zeros(2, 3, 16, 16)},
    lambda vae: vae.decode(vae.encode(torch.zeros(2, 3, 16, 16))),
    [
        ("encode", bad)
        for bad in (torch.zeros(2, 5, 2, 2), NAN * torch.zeros(2, 4, 2, 2), [0.0], torch.zeros(2, 4, 4, 4))
    ]
    + [("decode", bad) for bad in (torch.zeros(2, 3, 8, 8), torch.zeros(2, 16, 16), None)],
    args=(nn.Linear(1, 1), SPACE),
)
BACKBONE = Kind(
    DiffusionBackbone,
    {"read": FEATURES, "blocks": ()},
    lambda backbone: backbone(torch.zeros(3, 4, 2, 2), ONES, None),
    [
        ("read", bad)
        for bad in (
            (ONES,),
            wrong_features(visual=()),
            wrong_features(visual=(torch.zeros(3, 16, 15),) * 3),
            wrong_features(visual_grids=((3, 3),) * 3),
            wrong_features(temb=NAN * FEATURES.temb),
            wrong_features(pooled_text=FEATURES.pooled_text[:1]),
            wrong_features(text=()),
            wrong_features(output=torch.zeros(3, 4, 2, 2)),
            wrong_features(temb=None),
        )
    ]
    + [("max_side", "64"), ("max_side", 0), ("max_prompt", 77.0), ("side_multiple", True)],
    args=(FLOW, SPACE),
    also={"feature_spec": SPEC},
)
NOISE = Kind(
    NoiseProcess,
    {"add_noise": torch.zeros(3, 4, 2, 2), "target": torch.zeros(3, 4, 2, 2), "clean": torch.zeros(3, 4, 2, 2)},
    noise_of,
    [("add_noise", torch.zeros(3, 4)), ("add_noise", torch.full((3, 4, 2, 2), NAN)), ("add_noise", None)]
    + [("sigmas", bad) for bad in (torch.tensor([1.5, 0.0]), torch.tensor([0.0, 1.0]), torch.zeros(3), DROPPED)],
    also={
        "timesteps": torch.tensor([1000.0, 0.0]),
        "sigmas": torch.tensor([1.0, 0.0]),
        "from_config": classmethod(lambda *_: None),
    },
)
LATENTS = torch.zeros(2, 4, 2, 2)
FAMILY = Kind(
    Family,
    {
        "predict": LATENTS,
        "levels": (torch.tensor([1000.0, 500.0]), torch.tensor([1.0, 0.5, 0.0])),
        "blocks": (),
        "load_prompt_encoder": lambda self, *given, **named: made(ENCODER),
        "load_network": lambda self, *given, **named: nn.Linear(1, 1),
        "guide": LATENTS,
    },
    predicted,
    [("predict", bad) for bad in (torch.zeros(2, 4, 2), NAN * LATENTS, (LATENTS,), LATENTS[:1])]
    + [("levels", bad) for bad in (ONES, (ONES, ONES), (ONES[:2], 1.2 * ONES), (5000 * ONES[:2], ONES))]
    + [
        ("levels", (torch.tensor(timesteps), torch.tensor(sigmas)))
        for timesteps, sigmas in (
            ([500.0, 1000.0], [0.5, 1.0, 0.0]),
            ([1000.0, 500.0], [1.0, 0.5, 0.2]),
            ([1.0, 0.5], [1.0, 0.5, 0.0]),
        )
    ]
    + [("load_prompt_encoder", None), ("load_network", None), ("guide", LATENTS[:1])]
    + [
        ("load_prompt_encoder", lambda self, *given, bad=bad, **named: made(ENCODER, "__init__", bad))
        for bad in (without_super, early)
    ]
    + [("noise_process", DDPM(torch.linspace(0.9, 0.1, 1000))), ("clips", True)],
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
)
FLOW_FAMILY = Kind(
    FlowFamily,
    {"velocity": LATENTS, "load_prompt_encoder": None},
    run,
    [("velocity", bad) for bad in (torch.zeros(2, 4, 2), NAN * LATENTS, None)],
    args=(None,),
    also={"network_class": "", "lists": (), "default_guidance": 1.0, "width": 6, "temb_dim": 6},
)
GROUPS = torch.zeros(3, dtype=torch.int64)
ADVANTAGE = Kind(
    Advantage,
    {"__call__": ONES},
    lambda rule: rule(ONES, GROUPS),
    [("__call__", bad) for bad in (ONES[:, None], NAN * ONES, [1.0] * 3, None, ONES[:1], ONES.long())],
)
PARTS = Kind(
    Advantage,
    {"__call__": ONES},
    lambda rule: rule(torch.ones(3, 2), GROUPS),
    [("__call__", torch.ones(3, 2)), ("takes_parts", False)],
    also={"takes_parts": True},
)
CREDIT = Kind(
    Credit,
    {"__call__": torch.ones(3, 2)},
    lambda rule: rule.of_steps(torch.ones(3, 3), [0, 1]),
    [("__call__", bad) for bad in (torch.ones(3, 3), NAN * torch.ones(3, 2), None, ONES, torch.ones(3, 2).long())]
    + [("of_steps", returning(torch.ones(3, 3)))],
)
WINDOW = Kind(
    Window,
    {"start": 2},
    lambda window: (window.check(4), window.start(4, 0, torch.Generator())),
    [("start", bad) for bad in (-1, 3, 2.0, None, torch.tensor(2), True)]
    + [("size", bad) for bad in (DROPPED, 0, 5, "2", 2.0)],
    also={"size": 2},
)
RATIO = Kind(
    RatioRule,
    {"objective": (ONES, ONES, ONES > 0)},
    lambda rule: rule.objective(ONES, ONES, 0.2, DRIFT),
    [
        ("objective", bad)
        for bad in (
            ONES,
            (ONES, ONES),
            (ONES[:, None], ONES, ONES > 0),
            (NAN * ONES, ONES, ONES > 0),
            (ONES, ONES, ONES),
            (ONES, 1, ONES > 0),
        )
    ],
)
GATE = Kind(
    KLGate,
    {"opens": torch.ones(3, 2) > 0},
    lambda rule: rule.opens(torch.ones(3, 2)),
    [("opens", bad) for bad in (torch.ones(3, 2), ONES > 0, [True], None, torch.ones(3, 2).long())],
)
PENALTY = Kind(
    Penalty,
    {"penalty": torch.tensor(1.0)},
    lambda rule: rule.penalty(ONES, ONES),
    [("penalty", bad) for bad in (ONES, torch.tensor(NAN), 1.0, None, torch.tensor(1))],
)
CHOICE = Kind(
    StepChoice,
    {"choose": torch.tensor([0, 2])},
    lambda rule: rule.choose(4, torch.Generator()),
    [
        ("choose", bad)
        for bad in (
            torch.tensor([1, 1]),
            torch.tensor([0, 4]),
            torch.tensor([-1]),
            ONES,
            [0],
            torch.zeros(0, dtype=torch.int64),
        )
    ],
)
SELECTION = Kind(
    PairSelection,
    {"keep": ONES > 0},
    lambda rule: rule.keep(ONES, 0, SAMPLER),
    [("keep", bad) for bad in (ONES, ONES[:1] > 0, None, True)],
)
THRESHOLD = Kind(
    ScheduledThreshold,
    {"threshold": 0.5, "quantity": torch.ones(4)},
    chosen,
    [("threshold", bad) for bad in (2.0, NAN, None, -0.1)],
    args=(0.1, 0.2),
)
QUANTITY = Kind(
    ScheduledThreshold, {"quantity": torch.ones(4)}, chosen, [("quantity", ONES), ("quantity", None)], args=(0.1, 0.2)
)
REWARD = Kind(
    Reward,
    {"encode_prompts": None, "score": ONES, "score_clean": ONES},
    lambda reward: (reward(STATES, None), reward.score_clean(STATES.latents, rows=STATES.rows, encoded=None)),
    [("score", bad) for bad in (ONES[:, None], torch.tensor(1.0), NAN * ONES, [1.0] * 3, 1.0)]
    + [("score_clean", bad) for bad in (ONES[:, None], None, NAN * ONES)],
)
SOURCE = Kind(
    RewardSource,
    {"load": lambda self, policy: Scoring(), "latent_space": None, "scores_states": True},
    lambda source: (source.latent_space(), source.load(None)),
    [("load", bad) for bad in (lambda self, policy: None, lambda self, policy: nn.Linear(1, 1))]
    + [("latent_space", 4), ("parts", 2)],
)
SCORER = Kind(
    ImageScorer,
    {"identity": "mine", "score": ONES[:2]},
    lambda scorer: (scorer.identity(), scorer(PROMPTS, IMAGES)),
    [("identity", None), *(("score", bad) for bad in (ONES[:2, None], NAN * ONES[:2], [1.0, 1.0], ONES))],
    args=("Mine",),
)
TABLE = Kind(
    TableScorer,
    {"identity": "mine", "lookup": np.zeros((1, 2))},
    lambda scorer: scorer.lookup([PAIR]),
    [("lookup", bad) for bad in (np.zeros(2), [(0.0, 0.0)], None, np.zeros((1, 2), int))],
    args=("Mine",),
)
SCHEMA = Kind(
    ImageSchema,
    {"request": {"a": 1}, "scores": [1.0, 2.0]},
    lambda schema: (
        HTTPScorer(RemoteServer("http://localhost:1"), schema),
        schema.request(PROMPTS, ["", ""]),
        schema.scores({}, {}),
    ),
    [("path", DROPPED), ("request", ["a"]), ("request", None), ("scores", 1.0), ("scores", None)],
    also={"path": "/score"},
)
KINDS = [kind for kind in [*globals().values()] if isinstance(kind, Kind)]
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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.base not in (Metric, RewardLoss, LatentEncoder)])
def test_a_missing_method_is_named_with_its_base(kind: Kind) -> None:
    half = type("Half", (kind.base,), {})
    with pytest.raises(InputError, match=r"^Half lacks .* of ") as caught:
        half(*kind.args)
    assert all(name in str(caught.value) for name in half.__abstractmethods__)


def test_values_are_compared_in_the_first_call_shapes_in_each_and_none_through_super() -> None:
    results = [ONES, NAN * ONES, ONES[:, None]]
    head = made(HEAD, "forward", lambda self, features: results.pop(0))
    assert head(FEATURES).shape == (3,) and head(FEATURES).isnan().all()
    with pytest.raises(InputError, match=r"^Mine.forward returned \(3, 1\)"):
        head(FEATURES)
    inner = type(made(HEAD, "forward", ONES[:, None]))
    outer = type("Outer", (inner,), {"forward": lambda self, features: inner.forward(self, features).squeeze(-1)})
    assert outer()(FEATURES).shape == (3,)


@pytest.mark.parametrize(
    ("kind", "name", "method", "wanted"),
    [
        (HEAD, "forward", lambda self, features, timesteps: ONES, "self, features"),
        (LOSS, "forward", lambda self, chosen, rejected: ONES, "self, scores"),
        (LEVELS, "draw", lambda self, process: ONES, "self, generator, process"),
        (FAMILY, "guide", lambda self, with_prompt, without: None, "self, with_prompt, without, scale"),
        (FAMILY, "load_prompt_encoder", lambda self: None, "self, t5_length, load_t5, pretrained"),
        (FAMILY, "load_network", lambda self: None, "self, pretrained"),
        (FAMILY, "load_network", lambda self, *given: nn.Linear(1, 1), None),
        (FLOW_FAMILY, "velocity", lambda self, network, latents: None, "self, network, latents, sigma, .*, guidance"),
        (FAMILY, "mu", lambda self, steps: None, None),
        (ADVANTAGE, "__call__", lambda self, rewards: None, "self, rewards, groups"),
        (REWARD, "score_clean", lambda self, latents: None, "self, latents, rows, encoded, noise, sigmas"),
        (METRIC, "update", lambda self, one, two: None, "chosen_rewards, rejected_rewards, label"),
    ],
)
def test_a_method_that_takes_other_arguments_is_named(kind: Kind, name: str, method: Any, wanted: str | None) -> None:
    changed = Kind(kind.base, kind.sound | {name: method}, kind.use, [], kind.args, kind.also)
    if wanted is None:  # no method of this base
        kind.use(made(changed))
        return
    with pytest.raises(InputError, match=rf"Mine\.{name}\([^)]*\) must take \({wanted}\) \(test_promises.py:\d+\)$"):
        kind.use(made(changed))


def test_a_function_that_takes_other_arguments_is_named() -> None:
    def clean(latents: Tensor, timesteps: Tensor, prompts: list[str], clean: Tensor) -> Tensor:
        return latents

    CallableReward(lambda latents, timesteps, prompts, scale=1.0: latents)
    CallableReward(lambda *given, **named: given[0], needs_clean=True)
    CallableReward(clean, needs_clean=True)
    CallableReward(min)
    with pytest.raises(InputError, match=r"^clean\(latents, timesteps, prompts, clean\) must take \(latents"):
        CallableReward(clean)
    with pytest.raises(InputError, match=r"must take \(latents, timesteps, prompts, clean\) \(test_promises.py:\d+\)$"):
        CallableReward(lambda latents, timesteps, prompts: latents, needs_clean=True)
    with pytest.raises(InputError, match=r"^<lambda>\(prompts\) must take \(prompts, images\)"):
        CallableScorer(lambda prompts: ONES, "mine")


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


def test_a_later_batch_of_prompts_is_compared_by_shape() -> None:
    encoder = made(ENCODER, "encode_ids", lambda self, *ids: conditioning(1, 3, 5, pooled=None))
    encoder.tokenize = lambda prompts: (torch.ones(len(prompts), 3),)
    encoder.pooled_dim = 0
    encoder(PROMPTS[:1])
    with pytest.raises(InputError, match=r"^Mine.encode_ids returned prompt_embeds \(1, 3, 5\); it must be .*\(2, 3"):
        encoder(PROMPTS)


APART = r"^Mine.{} returned values of a row alone that are up to [\d.]+ .* \(test_promises.py:\d+\); compute each row"


def reading(changed: Callable[[Any], Any] = lambda found: found, features: Any = FEATURES) -> Any:
    def read(self: Any, latents: Tensor, *given: Any) -> Any:
        rows = latents.flatten(1)[:, 0].long()
        return changed(map_tensors(features, lambda tensor: tensor[rows]))

    return made(BACKBONE, "read", read)


NUMBERED = torch.arange(2.0)[:, None, None, None].expand_as(LATENTS)
"""Latents that hold the number of their row."""


def features_by(backbone: Any, head: Any) -> None:
    RewardNetwork(backbone, head).read(NUMBERED, ONES[:2], conditioning(2, 3, 5))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, features: features.temb[:, 0] - features.temb[:, 0].mean(),
        lambda self, features: features.temb[:, 0].softmax(dim=0),
        lambda self, features: features.temb.sum(dim=1).cumsum(dim=0),
        lambda self, features: torch.rand(len(features.temb)),
    ],
)
def test_a_head_whose_scores_depend_on_other_rows_is_refused(forward: Any) -> None:
    with pytest.raises(InputError, match=APART.format("forward")):
        features_by(reading(), made(HEAD, "forward", forward))


@pytest.mark.parametrize("pooled", ["sum", "mean", "masked mean"])
def test_a_head_that_reads_padding_is_refused(pooled: str) -> None:
    def forward(self: Any, features: Any) -> Any:
        text, mask = features.text[-1], features.text_mask[..., None]
        if pooled == "masked mean":
            return ((text * mask).sum(dim=1) / mask.sum(dim=1)).sum(dim=1)
        return getattr(text, pooled)(dim=1).sum(dim=1)

    padded = torch.arange(FEATURES.text[-1].shape[1]).expand(3, -1) < torch.tensor([2, 3, 4])[:, None]
    backbone = reading(features=replace(FEATURES, text_mask=padded))
    with nullcontext() if pooled == "masked mean" else pytest.raises(InputError, match=APART.format("forward")):
        features_by(backbone, made(HEAD, "forward", forward))


@pytest.mark.parametrize(
    "changed",
    [
        lambda found: replace(found, temb=found.temb - found.temb.mean(dim=0)),
        lambda found: replace(found, visual=tuple(tap + torch.rand(1) for tap in found.visual)),
    ],
)
def test_a_backbone_whose_features_depend_on_other_rows_is_refused(changed: Any) -> None:
    with pytest.raises(InputError, match=APART.format("read")):
        features_by(reading(changed), made(HEAD))


def test_rows_with_an_empty_prompt_each_are_compared() -> None:
    encoded, head = conditioning(2, 3, 5), made(HEAD, "forward", lambda self, features: features.temb[:, 0])
    RewardNetwork(reading(), head).read(NUMBERED, ONES[:2], encoded, encoded)


def test_rows_are_compared_once_in_evaluation_mode() -> None:
    lengths: list[int] = []
    backbone = reading(lambda found: lengths.append(len(found.temb)) or found)
    head = made(HEAD, "forward", lambda self, found: found.temb[:, 0] + self.training * found.temb[:, 0].mean())
    network = RewardNetwork(backbone, head).train()
    for _ in range(2):
        network.read(NUMBERED, ONES[:2], conditioning(2, 3, 5))
    assert lengths == [2, 1, 1, 2, 2] and head.training and backbone.training


def test_a_name_of_two_far_rows_is_named() -> None:
    names = [str(index) for index in range(2000)]
    names[1700] = names[900]
    reader = made(READER, "__getitem__", lambda self, index: replace(PAIR, pair_id=names[index]))
    with pytest.raises(InputError, match=r"pair_id='900' for rows 900 and 1700; it must be a name for each row"):
        [reader[index] for index in range(2000)]


def test_checks_get_arguments_in_the_order_of_the_parameters() -> None:
    window = made(WINDOW, "start", lambda self, first, iteration, generator: first - self.size)
    assert window.start(generator=torch.Generator(), iteration=9, first=4) == 4 - window.size
