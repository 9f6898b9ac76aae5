"""DiNa-LRM's head: every recorded intermediate, score and gradient."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from latentreward.core.contracts import Features, FeatureSpec, TapSpec
from latentreward.reward import GatedQFormerHead
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_close

FLOAT32_EPS = torch.finfo(torch.float32).eps
FLOAT32 = {"rtol": 1e-5, "atol": 2e-6}
BFLOAT16 = {"rtol": 2e-2, "atol": 2e-2}
BFLOAT16_SCORE = {"rtol": 2e-2, "atol": 3e-3}
every_case = pytest.mark.parametrize("case", cases("dina/head"), ids=lambda case: case.name)


def head_of(case: Case) -> GatedQFormerHead:
    """The head of a case with its recorded weights."""
    options = case.options
    config = options["head_config"]
    width = config["width"] if config["width"] > 0 else config["token_dim"]
    tap = TapSpec(config["token_dim"], (options["Nv"],))
    text_tap = TapSpec(config["token_dim"], (options["Nt"],))
    spec = FeatureSpec(
        (tap,) * config["n_visual_heads"],
        (text_tap,) * config["n_text_heads"],
        temb_dim=config["t_embed_dim"] if config["t_embed_dim"] > 0 else width,
        pooled_text_dim=1,
    )
    head = GatedQFormerHead(
        spec,
        width=width,
        num_queries=config["num_queries"],
        num_heads=config["num_attn_heads"],
        out_dim=config["out_dim"],
        use_proj_in=config["use_proj_in"],
        dropout=config["dropout"],
        rms_eps=FLOAT32_EPS if options["rms_eps"] is None else options["rms_eps"],
    )
    state = torch.load(case.file(options["weights_file"]), weights_only=True)
    head.load_state_dict(state)
    return head.to(getattr(torch, options["dtype"].removeprefix("torch."))).eval()


def levels_of(data: Tensors) -> list[Features]:
    """Recorded features, one record per noise level."""
    temb = data["in.t_embed"]
    prefixes = [f"in.k{k}." for k in range(temb.shape[1])] if temb.ndim == 3 else ["in."]
    return [features_of(data, prefix, temb[:, k] if temb.ndim == 3 else temb) for k, prefix in enumerate(prefixes)]


def features_of(data: Tensors, prefix: str, temb: Tensor) -> Features:
    visual, text = (
        tuple(data[f"{prefix}{stream}.{i}"] for i in range(len(data.below(f"{prefix}{stream}."))))
        for stream in ("visual", "text")
    )
    grids = tuple((tokens.shape[1],) for tokens in visual)
    return Features(visual, grids, text, pooled_text=temb.new_zeros(len(temb), 1), temb=temb)


def observed(head: GatedQFormerHead) -> dict[str, tuple[nn.Module, str]]:
    """Recorded name → the module whose input or output it is."""
    places = {
        "attn1.gate_vis_logit": (head.attn1.gate_vis, "output"),
        "attn1.h_sum": (head.attn1.to_out, "input"),
        "attn2.h_sum": (head.attn2.to_out, "input"),
        "queries.attn1": (head.attn1, "output"),
        "queries.attn2": (head.attn2, "output"),
        "queries.ffn": (head.head, "input"),
        "per_query": (head.head, "output"),
    }
    if hasattr(head.attn1, "gate_text"):
        places["attn1.gate_text_logit"] = (head.attn1.gate_text, "output")
    for stream in ("visual", "text"):
        if not hasattr(head, f"agg_{stream}"):
            continue
        places[f"cat.{stream}"] = (getattr(head, f"agg_{stream}"), "input")
        places[f"tokens.{stream}"] = (getattr(head, f"agg_{stream}"), "output")
        for i, adapter in enumerate(getattr(head, f"layer_adapters_{stream}")):
            places[f"film.{stream}.{i}"] = (adapter.proj, "input")
            places[f"adapter.{stream}.{i}"] = (adapter, "output")
    return places


@contextmanager
def observing(head: GatedQFormerHead) -> Iterator[dict[str, list[Tensor]]]:
    """Collect, call by call, what passes the places of :func:`observed`."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str, side: str) -> Callable[..., None]:
        return lambda _, inputs, output: seen[name].append(inputs[0] if side == "input" else output)

    places = observed(head)
    hooks = [module.register_forward_hook(keep(name, side)) for name, (module, side) in places.items()]
    yield seen
    for hook in hooks:
        hook.remove()


def score_of(head: GatedQFormerHead, levels: list[Features]) -> Tensor:
    score = head(levels[0]) if len(levels) == 1 else head.score_ensemble(levels)
    return score.reshape(len(score), -1)


@every_case
def test_outputs(case: Case) -> None:
    data, head = case.tensors(), head_of(case)
    with observing(head) as seen, torch.no_grad():
        found = {"score": score_of(head, levels_of(data))}
    for name, calls in seen.items():
        found |= {f"{name}.call{k}": call for k, call in enumerate(calls)} if len(calls) > 1 else {name: calls[0]}
    for name in data.below("out."):
        golden = data[f"out.{name}"]
        tolerance = FLOAT32
        if golden.dtype == torch.bfloat16:
            tolerance = BFLOAT16_SCORE if name == "score" else BFLOAT16
        assert_close(found[name], golden, name, **tolerance)


@every_case
def test_one_level_equals_an_ensemble_of_one(case: Case) -> None:
    data, head = case.tensors(), head_of(case)
    level = levels_of(data)[0]
    with torch.no_grad():
        assert torch.equal(head.score_ensemble([level]), head(level))


@pytest.mark.parametrize(
    "case", [case for case in cases("dina/head") if case.tensors().below("grad.")], ids=lambda case: case.name
)
def test_gradients(case: Case) -> None:
    data, head = case.tensors(), head_of(case)
    score_of(head, levels_of(data)).square().sum().backward()
    parameters = dict(head.named_parameters())
    for name in data.below("grad."):
        assert_close(parameters[name].grad, data[f"grad.{name}"], name, **FLOAT32)


@pytest.mark.parametrize(
    "case", [case for case in cases("dina/head") if "state_dict" in case.options], ids=lambda case: case.name
)
def test_shapes_of_the_published_files(case: Case) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in head_of(case).state_dict().items()}
    assert shapes == case.options["state_dict"]
