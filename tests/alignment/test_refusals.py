"""What the room refuses, before any weight is loaded: each row in one line, which names the setting."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from latentreward.alignment import (
    GDPO,
    Branching,
    ClippedPolicyLoss,
    CRDLoss,
    CRDModule,
    DDIMSampler,
    DGPOLoss,
    DiffusionDPOModule,
    DiffusionOPSDModule,
    DiversityAdvantage,
    FixedThreshold,
    FlowDPPO,
    FlowSDESampler,
    GainCredit,
    GRPOGuard,
    LinearDPO,
    LPOModule,
    MatchingLoss,
    MovingWindow,
    NFTLoss,
    NoisiestSteps,
    NormGuard,
    OnPolicyDistillationModule,
    OnPolicyLoss,
    OutcomeProcessLoss,
    PixelReward,
    PolicySource,
    Pruning,
    QuantileThreshold,
    RAMLoss,
    RandomSteps,
    RandomWindow,
    RankGate,
    ReFLModule,
    RewardGuidance,
    RewardLoss,
    RewardMixture,
    Sampling,
    SigmaThreshold,
    StateCredit,
    StepAwarePixelModule,
    StepDPO,
    StratifiedSteps,
    Teacher,
    TrajectoryGRPOModule,
    TurningPointCredit,
    VarianceThreshold,
)
from latentreward.alignment.policies.moving_average import DecayRamp
from latentreward.core.errors import InputError
from latentreward.diffusion.noise.schedules import static_levels
from latentreward.reward import CallableScorer, StepAwareScorer
from tests.alignment.modules.simple_reward import FirstChannelReward, OtherChannelsReward
from tests.alignment.modules.test_forward_process import make
from tests.alignment.modules.test_grpo import DifferentiableChannel, source, stepwise, trajectory
from tests.alignment.modules.toy_rewards import BrightnessSource
from tests.alignment.policies.alignment import tiny_source
from tests.alignment.rollout.test_ddim import CONFIG

KL = ClippedPolicyLoss(kl_weight=0.1)
PIXELS = PixelReward(CallableScorer(lambda prompts, images: torch.zeros(len(images)), name="same"))
GUIDED = Teacher(guidance_scale=3.0)


def mixture(normalise: Any, part: Any = FirstChannelReward) -> dict[str, Any]:
    return {"source_of_reward": lambda scale: RewardMixture([part(scale), part(scale)], normalise=normalise)}


MIXED = mixture("none")


def grpo(**options: Any) -> Any:
    return lambda: trajectory("sd35_tiny", **options)


def rows(kind: str, **options: Any) -> Any:
    return lambda: make(kind, **options)


def pruned(kind: str, **options: Any) -> Any:
    options = {"pruning": Pruning(6, 2), "source_of_reward": lambda scale: OtherChannelsReward(), **options}
    return grpo(**options) if kind == "trajectory" else rows(kind, **options)


def opsd(reward: Any = None, name: str = "sd35_tiny", **options: Any) -> Any:
    settings = {"sampling": Sampling(5), **options}
    return lambda: DiffusionOPSDModule(source(name), reward or BrightnessSource(), **settings)


def refl(reward: Any = None, **options: Any) -> Any:
    settings = {"sampling": Sampling(4), "stop_range": (1, 3), **options}
    return lambda: ReFLModule(source("sd15"), reward or BrightnessSource(), **settings)


def opd(*teachers: Teacher, **options: Any) -> Any:
    return lambda: OnPolicyDistillationModule(source("sd35_tiny"), [*teachers], **{"sampling": Sampling(4), **options})


def lpo(**options: Any) -> Any:
    return lambda: LPOModule(PolicySource(), BrightnessSource(), **options)


def dpo(**options: Any) -> Any:
    return lambda: DiffusionDPOModule(tiny_source("sd15"), **options)


def prune(reward: Any = None, **options: Any) -> Any:
    settings = {"candidates": 8, "after_steps": 4, **options}
    return lambda: Pruning(**settings).check("num_samples", 4, 10, reward or FirstChannelReward())


def sampler(name: str, **options: Any) -> Any:
    return Sampling(**options).sampler(PolicySource(name).resolve_family())


ROWS: dict[str, list[tuple[Callable[[], Any], str]]] = {
    "losses": [
        (lambda: ClippedPolicyLoss(clip_range=0.0), "clip_range=0"),
        (lambda: ClippedPolicyLoss(kl_weight=-1.0), "kl_weight=-1"),
        (lambda: ClippedPolicyLoss(max_advantage=0.0), "max_advantage=0"),
        (lambda: OutcomeProcessLoss(0.1, 0.0, 5.0, 0.0, 0.0), "process_weight=0"),
        (lambda: OutcomeProcessLoss(0.1, 0.0, 5.0, 1.0, math.nan), "process_weight=nan"),
        (lambda: DGPOLoss(beta=-1.0), "beta=-1"),
        (lambda: DGPOLoss(clip_range=0.0), "clip_range=0"),
        (lambda: CRDLoss(kl_weight=0.0), "kl_weight=0"),
        (lambda: CRDLoss(temperature=0.0), "temperature=0"),
        (lambda: MatchingLoss(power=0.0), "power=0"),
        (lambda: MatchingLoss(clip_range=2.0), "clip_range=2"),
        (lambda: MatchingLoss(scale_to=0.0), "scale_to=0"),
        (lambda: NFTLoss(beta=1.1), "beta=1.1"),
        (lambda: NFTLoss(max_advantage=0.0), "max_advantage=0"),
        (lambda: RAMLoss(-1.0), "multiplier=-1"),
        (lambda: RewardLoss(scale=math.inf), "scale=inf"),
        (lambda: RewardLoss(ceiling=math.nan), "ceiling = nan"),
        (lambda: StepDPO(beta=math.nan), "beta=nan"),
        (lambda: StepDPO(clip_range=1.0), "clip_range=1"),
        (lambda: LinearDPO(0.5), "eta=0.5"),
        (lambda: DecayRamp(slope=-1.0), "slope=-1"),
        (lambda: DecayRamp(most=1.0), "most=1"),
        (lambda: RankGate(0.5), "share=0.5"),
        (lambda: NormGuard(0.0), "weight=0"),
        (lambda: FlowDPPO(-1.0), "threshold=-1"),
    ],
    "rollouts": [
        (lambda: Branching(1), "num_candidates=1"),
        (lambda: Branching(low=500.0, high=100.0), "low=500"),
        (lambda: Branching(low=960).steps(sampler("sd_tiny", eta=0.5)), "low=960"),
        (lambda: TurningPointCredit("gain", "gain"), "main=gain"),
        (lambda: TurningPointCredit(weight=0.0), "weight=0"),
        (lambda: GainCredit(1.5), "gamma=1.5"),
        (lambda: MovingWindow(5).check(4), "window.size=5"),
        (lambda: MovingWindow(every=0), "every=0"),
        (lambda: RandomWindow(0), "size=0"),
        (lambda: FixedThreshold(1.1), "threshold=1.1"),
        (lambda: SigmaThreshold(0.5, 1.5), "high=1.5"),
        (lambda: VarianceThreshold(0.5, 0.2), "low=0.5"),
        (lambda: QuantileThreshold(2.0), "quantile=2"),
        (lambda: DDIMSampler(CONFIG, 1001), "num_inference_steps=1001"),
        (lambda: DDIMSampler(CONFIG, 20, 3.0), "eta=3"),
        (lambda: DDIMSampler(CONFIG | {"clip_sample": True}, 20), "clip_sample=true"),
        (lambda: DDIMSampler(CONFIG | {"thresholding": True}, 20), "thresholding=true"),
        (lambda: DDIMSampler(CONFIG | {"prediction_type": "sample"}, 20), "prediction_type 'sample'"),
        (
            lambda: DDIMSampler(CONFIG | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 20),
            "rescale_betas_zero_snr=true",
        ),
        (lambda: FlowSDESampler(*static_levels({"shift": 3.0}, 4), -1.0), "noise_level=-1"),
        (lambda: FlowSDESampler(*static_levels({"shift": 3.0}, 4), 1.5, "cps"), "noise_level=1.5"),
        (lambda: Sampling(0), "num_inference_steps=0"),
        (lambda: Sampling(eta=1.1), "eta=1.1"),
        (lambda: Sampling(noise_level=math.inf), "noise_level=inf"),
        (lambda: sampler("sd_tiny", flow_noise="dance"), "flow_noise=dance"),
        (lambda: sampler("sd35_tiny", num_inference_steps=1001), "num_inference_steps=1001"),
        (prune(candidates=3), "pruning.candidates=3"),
        (prune(after_steps=10), "pruning.after_steps=10"),
        (prune(after_steps=0), "pruning.after_steps is 0"),
        (prune(PIXELS), "pruning needs the score of a noisy state"),
        (prune(RewardMixture([FirstChannelReward()], normalise="running")), "pruning scores noisy states too"),
        (lambda: RewardGuidance(scale=0.0), "scale=0"),
        (lambda: RewardGuidance(beta=-1.0), "beta=-1"),
        (lambda: RewardGuidance(low=700.0), "low=700"),
        (lambda: RewardGuidance(high=1.0).check(sampler("sd35_tiny", noise_level=0.7)), "high=1"),
    ],
    "GRPO": [
        (lambda: trajectory(sampling=Sampling(4, eta=0.0)), "sampling.eta=0"),
        (grpo(num_trajectories=1), "num_trajectories=1"),
        (lambda: trajectory(low=990.0), "low=990"),
        (lambda: stepwise(candidates=Branching(3, low=990.0)), "low=990"),
        (lambda: trajectory(guidance_scale=0.5), "guidance_scale=0.5"),
        (lambda: stepwise(loss=OutcomeProcessLoss()), "StepwiseGRPOModule"),
        (lambda: TrajectoryGRPOModule(source("sd15"), PIXELS, credit=GainCredit()), "credit needs the score"),
        (lambda: TrajectoryGRPOModule(source("sd15"), PIXELS, reward_guidance=RewardGuidance()), "reward_guidance"),
        (
            lambda: trajectory(source_of_reward=DifferentiableChannel, reward_guidance=RewardGuidance(high=0.5)),
            "high=0.5",
        ),
        (grpo(trust_region=[GRPOGuard(), FlowDPPO()]), "GRPOGuard and FlowDPPO"),
        (grpo(trust_region=RankGate(), loss=KL), "RewardMixture"),
        (grpo(trust_region=RankGate(), **MIXED), "loss.kl_weight"),
        (grpo(reward_sigmas=(0.4, 0.4)), "reward_sigmas=[0.4, 0.4]"),
        (pruned("trajectory", trust_region=RankGate(), loss=KL, **MIXED), "trust_region looks at more"),
        (grpo(trust_region=GRPOGuard(), sampling=Sampling(4, flow_noise="cps")), "flow_noise=cps"),
        (grpo(trust_region=GRPOGuard(), loss=OutcomeProcessLoss(), credit=StateCredit()), "OutcomeProcessLoss"),
        (grpo(advantage=GDPO()), "GDPO"),
        (grpo(advantage=GDPO([1.0]), **MIXED), "advantage.weights=[1.0]"),
        (grpo(advantage=GDPO(), credit=GainCredit(), **MIXED), "GDPO takes each reward"),
        (grpo(loss=OutcomeProcessLoss()), "credit: StateCredit"),
        (grpo(window=MovingWindow(2), reward_guidance=RewardGuidance()), "window and reward_guidance"),
        (grpo(reward_guidance=RewardGuidance(), **mixture("group")), "normalise: none or running"),
        (grpo(credit=GainCredit(), **mixture("running")), "credit scores noisy states too"),
        (grpo(window=MovingWindow(9)), "window.size=9"),
        (grpo(sampling=Sampling(1)), "2 are needed"),
        (pruned("trajectory", pruning=Pruning(2, 2)), "num_trajectories=3"),
        (pruned("trajectory", credit=GainCredit()), "credit looks at more"),
        (pruned("trajectory", reward_guidance=RewardGuidance()), "reward_guidance looks at more"),
        (pruned("trajectory", advantage=DiversityAdvantage()), "advantage looks at more"),
    ],
    "finished samples": [
        (rows("nft", guidance_scale=3.0), "guidance_scale=3"),
        (rows("nft", sampling=Sampling(4, noise_level=0.7)), "sampling.noise_level=0.7"),
        (rows("nft", num_samples=1), "num_samples=1"),
        (rows("nft", name="sd15"), "no rectified flow"),
        (rows("ram", name="sd15", sampling=Sampling(4, eta=1.0)), "sampling.eta=1"),
        (rows("ram", draws=0), "draws is 0"),
        (rows("nft", trust_region=GRPOGuard()), "trust_region: GRPOGuard"),
        (rows("nft", advantage=GDPO()), "advantage: GDPO"),
        (rows("nft", reward_sigmas=()), "reward_sigmas=[]"),
        (rows("nft", steps=RandomSteps(0.1)), "share=0.1"),
        (rows("nft", steps=StratifiedSteps()), "count=6"),
        (rows("awm", loss=MatchingLoss(average_weight=0.0), average=DecayRamp()), "loss.average_weight=0"),
        (rows("dgpo", steps=NoisiestSteps()), "count=4"),
        (rows("crd", reference_guidance_scale=0.5), "reference_guidance_scale"),
        (pruned("nft", pruning=Pruning(2, 2)), "num_samples=3"),
        (pruned("ram", pruning=Pruning(6, 4)), "pruning.after_steps=4"),
        (pruned("nft", source_of_reward=lambda scale: PIXELS), "pruning needs the score"),
        (opsd(pruning=Pruning(6, 2)), "pruning"),
        (lambda: CRDModule(source("sd35_tiny"), BrightnessSource(), num_samples=3, pruning=Pruning(6, 2)), "pruning"),
        (opsd(query_sigma=1.0), "query_sigma=1"),
        (opsd(query_sigma=0.004), "query_sigma=0.004"),
        (opsd(query_sigma=0.99, name="sd15"), "query_sigma=0.99"),
        (opsd(radius=0.0), "radius=0"),
        (opsd(ascent_steps=0), "ascent_steps is 0"),
        (opsd(RewardMixture([BrightnessSource()], normalise="group")), "normalise: none or running"),
    ],
    "other methods": [
        (lpo(sampling=Sampling(eta=0.0)), "eta"),
        (lpo(candidates=Branching(low=999.5)), "low=999.5"),
        (lpo(beta=0.0), "beta=0"),
        (lpo(clip_range=1.5), "clip_range=1.5"),
        (lpo(guidance_scale=0.5), "guidance_scale=0.5"),
        (dpo(beta=-1.0), "beta=-1"),
        (dpo(eval_timesteps=()), "eval_timesteps"),
        (dpo(prior_noise=True), "prior_noise"),
        (refl(PixelReward(StepAwareScorer()), scored="state"), "scored=state"),
        (refl(RewardMixture([BrightnessSource(), PIXELS]), scored="state"), "scored=state"),
        (refl(scored="state"), "stop_range=[1, 3]"),
        (refl(PIXELS), "ReFLModule needs the gradient"),
        (refl(stop_range=(0, 2)), "stop_range=[0, 2]"),
        (refl(gradient_steps=0), "gradient_steps=0"),
        (refl(kl_weight=-1.0), "kl_weight=-1"),
        (refl(alternate_pretraining=True), "alternate_pretraining=true"),
        (opd(), "teachers is empty"),
        (opd(Teacher()), "teachers"),
        (opd(Teacher(guidance_scale=0.5)), "guidance_scale=0.5"),
        (opd(Teacher("a.ckpt", "b")), "checkpoint and pipeline"),
        (opd(Teacher("missing.ckpt")), "missing.ckpt"),
        (opd(Teacher(pipeline="sd_tiny")), "pipeline=sd_tiny"),
        (opd(GUIDED, loss=OnPolicyLoss("kl_exact")), "sampling.noise_level=0"),
        (opd(GUIDED, steps=RandomSteps(0.1)), "share=0.1"),
        (lambda: StepAwarePixelModule(tiny_source("sd15"), "spm_tiny", guidance_scale=0.5), "guidance_scale=0.5"),
        (lambda: StepAwarePixelModule(tiny_source("sd15"), "spm_tiny", decode_batch_size=0), "decode_batch_size is 0"),
    ],
}


@pytest.mark.parametrize("part", ROWS)
def test_refused_in_one_line_that_names_the_setting(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PolicySource, "load", lambda *_: pytest.fail("weights were loaded"))
    for number, (make_one, key) in enumerate(ROWS[part]):
        with pytest.raises(InputError) as caught:
            make_one()
        assert key in str(caught.value) and "\n" not in str(caught.value), (number, key, caught.value)


def test_timesteps_to_validate_at_are_in_the_schedule_and_each_once() -> None:
    for given in ((101, 501, 101), (1001,)):
        with pytest.raises(InputError, match="eval_timesteps="):
            DiffusionDPOModule(tiny_source("sd15"), eval_timesteps=given)
