"""Rewards on every family: features as promised, gradients for all that trains, scores of rows by themselves."""

from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning
from latentreward.core.registry import create_backbone
from latentreward.diffusion import LoRA
from latentreward.reward import CLIPProjectionHead, GatedQFormerHead, RewardHead
from tests.diffusion.families.twins import PROMPTS, TWINS, Twin, every_network, every_twin, noise_for, one_per_family
from tests.marks import release_after, rotated_after

HEADS = ["q_former", "projection"]
every_head = pytest.mark.parametrize("kind", HEADS)


class Scorer(nn.Module):
    """A backbone with a head."""

    def __init__(self, twin: Twin, kind: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        taps = [*range(1, twin.layers)]
        settings = {"visual_taps": taps, "text_taps": taps if kind == "q_former" else [], "tuning": "lora", **options}
        if settings["tuning"] == "lora":
            settings["lora"] = LoRA(2, 4.0)
        self.backbone = create_backbone(twin.backbone, source=twin.folder, **settings)
        spec = self.backbone.feature_spec
        self.head: RewardHead = (
            GatedQFormerHead(spec, num_queries=2, num_heads=2)
            if kind == "q_former"
            else CLIPProjectionHead(spec, guidance=2.0, embed_dim=8)
        )
        if not self.head.reads_text:
            self.backbone.drop_text_taps()
        if not self.head.reads_temb:
            self.backbone.drop_time_embedding()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "lora_B" in name or name.startswith("head"):
                    parameter.add_(0.1 * torch.randn_like(parameter))

    def forward(self, latents: Tensor, sigmas: Tensor, prompts: tuple[str, ...]) -> Tensor:
        return self.score(latents, sigmas, *self.encode(prompts))

    def encode(self, prompts: tuple[str, ...]) -> tuple[Conditioning, Conditioning | None]:
        uncond = self.backbone.encode_prompts([""]) if self.head.needs_uncond else None
        return self.backbone.encode_prompts(prompts), uncond

    def score(self, latents: Tensor, sigmas: Tensor, cond: Conditioning, uncond: Conditioning | None) -> Tensor:
        return self.head(self.backbone(latents, 1000 * sigmas, cond, uncond))


def inputs(twin: Twin) -> tuple[Tensor, Tensor]:
    return noise_for(twin.source().resolve_family().latent_shape(*twin.size)), torch.tensor([0.3, 0.7])


@pytest.mark.parametrize("kind", rotated_after(1, HEADS))
@every_twin
def test_a_score_does_not_depend_on_other_rows(twin: Twin, kind: str) -> None:
    model, (latents, sigmas) = Scorer(twin, kind).eval(), inputs(twin)
    with torch.no_grad():
        together = model(latents, sigmas, PROMPTS)
        alone = [model(latents[[row]], sigmas[[row]], PROMPTS[row : row + 1]) for row in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert together[0] != together[1]


@pytest.mark.parametrize(
    "twin", [TWINS["lumina2"], *rotated_after(0, one_per_family("lumina2"))], ids=attrgetter("family")
)
def test_a_first_pass_may_be_checkpointed(twin: Twin) -> None:
    """What is checked once is computed within the first block, and not when the block is computed again.

    Lumina 2.0 has layers with LoRA before its first block, whose input therefore needs a gradient.
    """
    model = Scorer(twin, "projection", gradient_checkpointing=True).train()
    latents, sigmas = inputs(twin)
    model(latents.requires_grad_(), sigmas, PROMPTS).sum().backward()
    assert latents.grad is not None


@every_network
@pytest.mark.parametrize(
    ("kind", "tuning"),
    rotated_after(2, [("q_former", "lora"), ("projection", "full"), ("q_former", "full"), ("projection", "lora")]),
)
def test_all_that_trains_has_a_gradient(twin: Twin, kind: str, tuning: str) -> None:
    """Else DDP would stop at its second step."""
    model, (latents, sigmas) = Scorer(twin, kind, tuning=tuning).train(), inputs(twin)
    model(latents, sigmas, PROMPTS).square().sum().backward()
    missing = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not missing


def early_taps(twin: Twin) -> list[dict[str, Any]]:
    """Every last tap, with and without text, and with text or image that is read before the blocks alone."""
    pairs = [(0, [0]), (0, [])]
    for tap in range(1, twin.layers):
        pairs += [(tap, [tap]), (tap, []), (tap, [0]), *([(0, [tap])] if twin.family != "wan21" else [])]
    return [{"visual_taps": [visual], "text_taps": text} for visual, text in [*pairs, (twin.layers, [])]]


@pytest.mark.slow
@every_head  # but SD3's: T5 has no part in its pooled vector, which alone is read at tap 0
@pytest.mark.parametrize("twin", release_after(1, one_per_family(without="sd3")), ids=lambda twin: twin.family)
def test_all_that_trains_has_a_gradient_at_every_tap(twin: Twin, kind: str) -> None:
    latents, sigmas = inputs(twin)
    for taps in early_taps(twin):
        no_prompt = kind == "q_former" and taps == {"visual_taps": [0], "text_taps": []}
        text: Any = {"text_encoder_tuning": "frozen" if no_prompt else "full"}
        model = Scorer(twin, kind, tuning="full", **text, **taps).train()
        model(latents, sigmas, PROMPTS).square().sum().backward()
        missing = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
        assert not missing, taps
        assert any(weight.requires_grad for weight in model.backbone.transformer.parameters()), taps


@every_network
def test_latents_get_a_gradient(twin: Twin) -> None:
    model, (latents, sigmas) = Scorer(twin, "q_former").eval(), inputs(twin)
    latents.requires_grad_()
    model(latents, sigmas, PROMPTS).sum().backward()
    assert latents.grad is not None and latents.grad.isfinite().all() and latents.grad.flatten(1).any(dim=1).all()


@pytest.mark.parametrize("twin", one_per_family(), ids=lambda twin: twin.family)
def test_bfloat16_does_not_join_noise_levels(twin: Twin) -> None:
    """Its numbers from 500 on are 2 or 4 apart. Wan's scheduler rounds timesteps down."""
    settings = {"visual_taps": [1], "text_taps": [], "tuning": "frozen", "frozen_dtype": "bfloat16"}
    backbone = create_backbone(twin.backbone, source=twin.folder, **settings).eval()
    (latents, _), prompts = inputs(twin), (PROMPTS[0],) * 2
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = backbone(latents[[0, 0]], torch.tensor([800.0, 801.0]), backbone.encode_prompts(prompts))
    assert not torch.equal(*features.temb)


@every_network
def test_widths_are_known_without_a_text_encoder(twin: Twin) -> None:
    """The first pass compares the features with what is promised."""
    backbone = create_backbone(twin.backbone, source=twin.folder, visual_taps=[1], text_taps=[1], tuning="frozen")
    encoder, (latents, sigmas) = backbone.text_encoder, inputs(twin)
    want, backbone.text_encoder = backbone.feature_spec, None
    with torch.no_grad():
        backbone(latents, 1000 * sigmas, encoder(PROMPTS))
    found = backbone.feature_spec
    assert (found.pooled_text_dim, found.temb_dim) == (want.pooled_text_dim, want.temb_dim)
    assert [tap.width for tap in found.text] == [tap.width for tap in want.text]
