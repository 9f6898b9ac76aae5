"""DRM: its head, and the whole model on SD3's output map with the last blocks left out."""

from dataclasses import replace

import pytest
from diffusers import SD3Transformer2DModel
from torch import Tensor

from latentreward.core.contracts import Conditioning, FeatureSpec, LatentSpace, TapSpec
from latentreward.diffusion import ContinuousFlow, SD3DiTBackbone
from latentreward.reward import BradleyTerryLoss, DRMHead
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_within
from tests.reward.heads.features import DIT_SPEC, random_features
from tests.reward.losses.pairs import scores_of

every_case = pytest.mark.parametrize("case", cases("algos/drm_head"), ids=lambda case: case.name)


def head_of(data: Tensors, prefix: str, groups: int) -> DRMHead:
    """The head with the stored weights, whose shapes give its sizes; released names to ours."""
    stages = sorted({name.split(".")[0] for name in data.below(prefix) if name.startswith("down")})
    widths = tuple(len(data[f"{prefix}{stage}.0.bias"]) for stage in stages)
    spec = FeatureSpec((), (), 1, 1, TapSpec(data[f"{prefix}{stages[0]}.0.weight"].shape[1], (16, 16)))
    head = DRMHead(spec, widths=widths, groups=groups, hidden=len(data[f"{prefix}mlp.0.bias"])).eval()
    released = {ours: name for name in data.below(prefix) if (ours := own_name(name, stages)) in head.state_dict()}
    head.load_state_dict({ours: data[prefix + name].float() for ours, name in released.items()})
    return head


def own_name(name: str, stages: list[str]) -> str:
    stage, _, rest = name.partition(".")
    return f"stages.{stages.index(stage)}.{rest}" if stage in stages else name


def score(head: DRMHead, output: Tensor) -> Tensor:
    return head(replace(random_features(DIT_SPEC, batch=len(output)), output=output))


@every_case
def test_head_and_loss(case: Case) -> None:
    data = case.tensors()
    variants = [name.removesuffix(".loss") for name in data if name.endswith(".loss")]
    assert variants
    for variant in variants:
        prefix, head = f"{variant}.", head_of(data, f"{variant}.weights.", groups=int(variant[1:]))
        win, lose = (data[prefix + side].clone().requires_grad_() for side in ("win", "lose"))
        first, second = score(head, win), score(head, lose)
        loss = BradleyTerryLoss()(replace(scores_of(first), rejected=second))
        loss.backward()
        found = {"score_win": first[:, None], "score_lose": second[:, None], "loss": loss}
        found |= {"grad_win": win.grad, "grad_lose": lose.grad}
        stages = sorted({name.split(".")[0] for name in data.below(f"{prefix}grad_norm.") if name.startswith("down")})
        slopes = {name: weight.grad.norm() for name, weight in head.named_parameters()}
        found |= {f"grad_norm.{name}": slopes[own_name(name, stages)] for name in data.below(f"{prefix}grad_norm.")}
        if head.stages[0][1].num_groups == head.stages[0][1].num_channels:
            # A norm of single channels takes any constant away: what is left of the gradient is rounding.
            found.pop("grad_norm.down1.0.bias")
            assert max(slopes["stages.0.0.bias"], data[f"{prefix}grad_norm.down1.0.bias"]) < 1e-6
        for name, value in found.items():
            assert_within(value, data[prefix + name], prefix + name, 2e-4)


@every_case
def test_whole_model(case: Case) -> None:
    data, config = case.tensors(), case.options["sd3_config"]
    names = data.below("full.transformer.")
    space = LatentSpace(channels=config["in_channels"], downscale=8, scaling_factor=1.0, shift_factor=0.0)
    conditioning = Conditioning(data["full.encoder_hidden_states"], data["full.pooled_projections"])
    head = head_of(data, "full.head.", groups=8)
    left_out = [name.removesuffix(".score") for name in data.below("full.missing") if name.endswith(".score")]
    assert left_out
    for missing in left_out:
        dit = SD3Transformer2DModel(**config)
        dit.load_state_dict({name: data[f"full.transformer.{name}"].float() for name in names})
        taps = (config["num_layers"] - int(missing),), ()
        backbone = SD3DiTBackbone(dit, ContinuousFlow(), space, None, *taps, output_map=True).eval()
        latents, prefix = data["full.latents"].clone().requires_grad_(), f"full.missing{missing}."
        features = backbone(latents, data["full.timestep"], conditioning)
        scores = head(features)
        scores.sum().backward()
        found = {"features": features.output, "score": scores[:, None], "grad_latents": latents.grad}
        for name, value in found.items():
            assert_within(value, data[prefix + name], prefix + name, 2e-4)


@every_case
def test_sizes_of_the_released_head(case: Case) -> None:
    head = DRMHead(FeatureSpec((), (), 1, 1, TapSpec(16, (64, 64))))
    released = case.options["real_size_head_sd35"]
    stages = sorted({name.split(".")[0] for name in released if name.startswith("down")})
    ours = {name: list(weight.shape) for name, weight in head.named_parameters()}
    assert ours == {own_name(name, stages): shape for name, shape in released.items()}
