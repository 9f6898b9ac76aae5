"""Fused LoRA layers: results and gradients of peft's own, in fewer kernels; what they cannot fuse is peft's."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentreward.alignment import AdapterSwitch
from latentreward.diffusion.backbones.fused_lora import fuse_lora
from latentreward.diffusion.backbones.weights import quantize


def made(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A layer of width 6 to 5 with two adapters of ranks 2 and 3, whose B is no zero."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    for name, rank in (("first", 2), ("second", 3)):
        settings = {"r": rank, "lora_alpha": 5, "target_modules": ["0"], **options}
        inject_adapter_in_model(LoraConfig(**settings), network, name)
    for name, weight in network.named_parameters():
        if "lora_" in name:
            weight.requires_grad_()
            nn.init.normal_(weight)
    return network.to(dtype)


def both(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """Networks that compute as peft does, and fused."""
    plain = made(dtype, **options)
    fused = deepcopy(plain)
    fuse_lora(fused)
    return plain, fused


def results(network: Any, call: Callable[[Any, Tensor], Tensor], x: Tensor) -> list[Tensor | None]:
    """Return the output and the gradients of x and of all weights."""
    x = x.clone().requires_grad_()
    output = call(network, x)
    output.float().sin().sum().backward()
    return [output, x.grad, *(weight.grad for _, weight in sorted(network.named_parameters()))]


@pytest.mark.parametrize("active", [["first"], ["second"], ["first", "second"], []])
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (2, 1, 3, 6)])
def test_outputs_and_gradients_are_those_of_peft(active: list[str], shape: tuple[int, ...]) -> None:
    x, networks = torch.randn(shape, dtype=torch.float64), both()
    for network in networks:
        AdapterSwitch(network, active)
    plain, fused = (results(network, lambda network, x: network(x), x) for network in networks)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    assert sum(gradient is not None for gradient in fused) == 2 + 2 * len(active)


def test_a_reference_and_checkpointed_blocks_are_those_of_peft() -> None:
    networks, x = both(), torch.randn(2, 3, 6, dtype=torch.float64)
    calls: list[Callable[[Any, Tensor], Tensor]] = [
        lambda network, x: checkpoint(network, x, use_reentrant=False),
        lambda network, x: network(x.transpose(0, 1)),  # a view
    ]
    for call in calls:
        plain, fused = (results(network, call, x) for network in networks)
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    switches = [AdapterSwitch(network, "first") for network in networks]
    with switches[0].use(None), switches[1].use(None):
        torch.testing.assert_close(networks[1](x), networks[0](x), rtol=0, atol=0)
    with torch.no_grad(), torch.inference_mode():
        torch.testing.assert_close(networks[1](x), networks[0](x))


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_type", [torch.float32, torch.bfloat16])
def test_under_autocast_results_are_no_less_exact_than_those_of_peft(
    x_type: torch.dtype, base_type: torch.dtype
) -> None:
    """A and B are float32; the base may be stored in bfloat16."""
    networks = both(torch.float32)
    for network in networks:
        network[0].base_layer.to(base_type)
    x = torch.randn(64, 3, 6).to(x_type)

    def call(network: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
            return network(x)

    exact = results(deepcopy(networks[0]).double(), call, x.double())
    plain, fused = (results(network, call, x) for network in networks)
    for found, of_peft, expected in zip(fused, plain, exact, strict=True):
        if found is None or of_peft is None or expected is None:
            assert found is of_peft is expected is None
            continue
        assert found.dtype == of_peft.dtype
        errors = [(one.double() - expected).square().mean().sqrt() for one in (found, of_peft)]
        assert errors[0] < 1.1 * errors[1] < 0.1 * expected.std()
    if x_type is base_type is torch.bfloat16:  # without autocast A and B of float32 need peft's conversions
        torch.testing.assert_close(networks[1](x), networks[0](x), rtol=0, atol=0)


def test_what_cannot_be_fused_is_computed_by_peft() -> None:
    """A bias of B, DoRA, weights that are merged, types that do not fit; hooks on base or B, a quantised base."""
    x = torch.randn(3, 6, dtype=torch.float64)
    for options in ({"lora_bias": True}, {"use_dora": True}):
        plain, fused = both(**options)
        torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=0)
    plain, fused = both()
    fused[0].base_layer.register_full_backward_hook(lambda *_: None)
    torch.testing.assert_close(results(fused, torch.nn.Module.__call__, x), results(plain, torch.nn.Module.__call__, x))
    for network in (plain, fused):
        network[0].merge()
    torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=0)
    for layer in ("base_layer", "lora_B.second"):
        hooked = made()
        hooked[0].get_submodule(layer).register_forward_hook(lambda *_: None)
        fuse_lora(hooked)
        assert type(hooked[0]) is lora.Linear


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16])
def test_layers_on_a_quantised_base_are_left_alone(x_type: torch.dtype) -> None:
    """Their outputs have the type of the input, also under autocast."""
    network = made(torch.float32)
    quantize([network], "int8")
    fuse_lora(network)
    assert type(network[0]) is lora.Linear
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(4, 3, 6).to(x_type))


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_a_result_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    _, fused = both()
    with torch.no_grad():
        output = fused(torch.randn(shape, dtype=torch.float64))
    assert not output._is_view()
    output += torch.ones(5, dtype=torch.float64, requires_grad=True)
    output.sum().backward()


def test_dropout_is_applied_to_the_adapters_input() -> None:
    networks, x = both(lora_dropout=0.5), torch.randn(64, 6, dtype=torch.float64)
    found = []
    for network in networks:
        torch.manual_seed(1)
        found.append(network.train()(x))
    torch.testing.assert_close(*found)
    assert not torch.allclose(networks[1].eval()(x), found[1])


def test_a_compiled_layer_is_one_graph() -> None:
    networks, x = both(), torch.randn(2, 3, 6, dtype=torch.float64)
    compiled = torch.compile(networks[1], backend="aot_eager", fullgraph=True)
    plain, fused = (results(network, lambda network, x: network(x), x) for network in (networks[0], compiled))
    torch.testing.assert_close(fused, plain)
