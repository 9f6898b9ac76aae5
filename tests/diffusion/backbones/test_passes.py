"""A recorded pass ends behind the last tap, and leaves the network as it was."""

from typing import Any

import pytest
import torch

from tests.diffusion.backbones.networks import inputs_of, network_of, tiny_backbone


@pytest.mark.parametrize(
    ("name", "taps", "left_out"),
    [
        ("sd35", {"visual_taps": (2,), "text_taps": ()}, ("transformer_blocks.2", "norm_out", "proj_out")),
        ("sd35", {"visual_taps": (0,), "text_taps": (0,)}, ("transformer_blocks.0", "norm_out")),
        ("sd15", {"visual_taps": (1,)}, ("down_blocks.1", "mid_block", "conv_out")),
        ("sd15", {}, ("up_blocks.0", "conv_out")),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_what_nobody_reads_does_not_run(name: str, taps: dict[str, Any], left_out: Any, recompute: bool) -> None:
    backbone, other = tiny_backbone(name, tuning="full", **taps), tiny_backbone(name, output_map=True, tuning="full")
    whole = type(network_of(other)).from_config(network_of(other).config).train()
    shared, latents = backbone.with_network(whole, backbone.text_encoder), inputs_of(backbone)
    assert shared is not None
    if recompute:
        whole.enable_gradient_checkpointing()
    ran: list[str] = []
    for part in left_out:
        whole.get_submodule(part).register_forward_hook(lambda *call, part=part: ran.append(part))
    before = {key: value for key, value in vars(whole).items() if key != "training"}
    first, parts = latents[0].requires_grad_(), [*whole.named_modules()]
    features = shared.read(*latents)
    assert not ran and [*whole.named_modules()] == parts and vars(whole) == {**before, "training": True}
    sum(tap.square().sum() for tap in features.visual).backward()
    assert not ran and first.grad is not None and first.grad.abs().max() > 0
    assert torch.is_tensor(features.temb) and features.output is None
