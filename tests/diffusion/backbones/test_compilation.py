"""Compiled blocks: equal results, few graphs, and eager code where PyTorch cannot compile."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from latentreward.diffusion.backbones.compilation import compile_blocks
from tests.diffusion.backbones.graphs import counted_graphs
from tests.diffusion.backbones.networks import inputs_of, tiny_backbone
from tests.diffusion.backbones.test_tuning import total


@pytest.mark.rotated
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["sd15", "sd35"])
def test_features_and_gradients_are_those_of_eager_blocks(name: str, checkpointing: bool) -> None:
    few: dict[str, Any] = {"visual_taps": (1,)}
    if name == "sd35":
        few |= {"text_taps": (1,), "num_layers": 2}
    plain = tiny_backbone(name, tuning="full", **few)
    compiled = tiny_backbone(name, tuning="full", gradient_checkpointing=checkpointing, **few)
    compile_blocks(compiled.blocks())
    inputs = inputs_of(plain)
    expected, features = plain(*inputs), compiled(*inputs)
    torch.testing.assert_close(features.visual, expected.visual, rtol=1e-4, atol=1e-4)
    total(expected).backward()
    total(features).backward()
    gradients = {key: parameter.grad for key, parameter in plain.named_parameters()}
    assert any(gradient is not None for gradient in gradients.values())
    for key, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-5, msg=key)


def unet() -> nn.Module:
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    widths = {"block_out_channels": (8, 16), "cross_attention_dim": 8, "attention_head_dim": 4, "norm_num_groups": 4}
    return UNet2DConditionModel(layers_per_block=1, down_block_types=down, up_block_types=up, **widths)


def dit() -> nn.Module:
    widths = {"joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 8}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2}
    size = {"sample_size": 16, "pos_embed_max_size": 16, "in_channels": 4, "out_channels": 4}
    return SD3Transformer2DModel(num_layers=3, **widths, **heads, **size)


def predicted(network: Any, rows: int, side: int, tokens: int) -> Tensor:
    torch.manual_seed(0)
    latents, states, times = torch.randn(rows, 4, side, side), torch.randn(rows, tokens, 8), torch.ones(rows)
    pooled = () if isinstance(network, UNet2DConditionModel) else (torch.randn(rows, 8),)
    if pooled:
        return network(latents, states, *pooled, times).sample
    return network(latents, times, states).sample


def blocks_of(network: Any) -> list[nn.Module]:
    if isinstance(network, UNet2DConditionModel):
        return [*network.down_blocks, network.mid_block, *network.up_blocks]
    return [*network.transformer_blocks]


@pytest.mark.rotated
@pytest.mark.slow
@pytest.mark.parametrize("make", [unet, dit])
def test_few_graphs_for_gradients_and_odd_batches(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = counted_graphs(monkeypatch)
    network = make()
    plain = deepcopy(network)
    compile_blocks(blocks_of(network))
    for rows in (4, 3, 8):
        for gradient in (False, True):
            with torch.set_grad_enabled(gradient):
                found, expected = (predicted(one, rows, 16, 5) for one in (network, plain))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert len(graphs) == (5 if make is unet else 2)  # levels of unlike widths; the last block of SD3 has no text after
    assert set(graphs.values()) == {2}
    with torch.no_grad():  # a batch of one, another size, another length of prompts: one each, and one for all others
        for rows, side, tokens in ((1, 16, 5), (4, 12, 5), (4, 8, 5), (4, 16, 7), (4, 16, 9)):
            predicted(network, rows, side, tokens)
    assert max(graphs.values()) <= 8
    assert not torch._dynamo.utils.counters["recompile_limit"]


def test_a_block_that_cannot_be_compiled_is_computed_as_before() -> None:
    def fail(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    layer = nn.Linear(3, 3)
    expected = layer(torch.ones(2, 3))
    compile_blocks([layer], backend=fail)
    with pytest.warns(UserWarning, match=r"performance\.compile_blocks: PyTorch cannot compile Linear, .*no compiler"):
        found = layer(torch.ones(2, 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    layer(torch.ones(2, 3))  # without a second warning, which would be an error


def test_a_compiled_block_keeps_names_hooks_copies_and_its_class() -> None:
    layer, calls = nn.Linear(3, 3), []
    compile_blocks([layer], backend="eager")
    compile_blocks([layer], backend="eager")
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert isinstance(layer, nn.Linear)
    assert type(layer).__name__ == "Linear"
    assert [*layer.state_dict()] == ["weight", "bias"]
    copied = deepcopy(layer)
    with torch.no_grad():
        copied.weight.zero_()
    assert not torch.equal(copied(torch.ones(2, 3)), layer(torch.ones(2, 3)))
    assert calls == [1, 1]
