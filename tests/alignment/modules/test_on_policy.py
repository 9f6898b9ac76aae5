"""On-policy distillation: the states, the teachers, the loss of both kinds of network, refusals, resumes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import (
    DiffusionNFTModule,
    OnPolicyDistillationModule,
    OnPolicyLoss,
    PolicySource,
    RandomSteps,
    Sampling,
    Teacher,
    sample_latents,
    sample_trajectories,
)
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError
from latentreward.diffusion import LoRA
from tests.alignment.modules.lpo_runs import make_trainer
from tests.alignment.modules.simple_reward import FirstChannelReward
from tests.alignment.modules.test_forward_process import BATCH, PROMPTS, adapter, clones, loaders, moved
from tests.alignment.modules.test_grpo import attached
from tests.diffusion.families.twins import TWINS
from tests.marks import slow_after
from tests.tiny_pipelines import pipeline_folder, source_of

GUIDED = Teacher(guidance_scale=3.0)


def source(name: str, rank: int = 4) -> PolicySource:
    return PolicySource(source_of(name), lora=LoRA(rank=rank, alpha=2 * rank))


def make(*teachers: Teacher, name: str = "sd35_tiny", **options: Any) -> OnPolicyDistillationModule:
    settings: dict[str, Any] = {"sampling": Sampling(4), "seed": 1, **options}
    return OnPolicyDistillationModule(source(name), list(teachers or (GUIDED,)), **settings)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run of another method, whose adapter has another rank; and its adapter's weights."""
    folder = tmp_path_factory.mktemp("teacher")
    module = DiffusionNFTModule(
        source("sd35_tiny", rank=2), FirstChannelReward(10.0), sampling=Sampling(2), num_samples=2, seed=3
    )
    trainer = make_trainer(folder, max_steps=1)
    trainer.fit(module, datamodule=loaders())
    moved(module)
    trainer.save_checkpoint(folder / "teacher.ckpt")
    return folder / "teacher.ckpt", clones(adapter(module))


def guided(module: OnPolicyDistillationModule, rows: Any, scale: float) -> Tensor:
    """The base with classifier-free guidance, of both its outputs."""
    encoded, empty = (module.policy.encode_prompts(texts) for texts in (rows.prompts, [""] * len(rows)))
    with torch.no_grad(), module.policy.reference():
        without, with_prompt = (module.policy.predict(rows.latents, rows.timesteps, one) for one in (empty, encoded))
    return without + scale * (with_prompt - without)


def test_rows_are_the_states_of_the_policys_own_samples() -> None:
    module = attached(make())
    moved(module)
    rows = module.roll_out(BATCH)
    assert len(rows) == 8
    found = sample_trajectories(module.policy.eval(), module.sampler, BATCH, module.sampling, module.guidance_scale, 1)
    torch.testing.assert_close(rows.latents.view(2, 4, *rows.latents.shape[1:]), found.latents[:4].transpose(0, 1))
    assert torch.equal(rows.timesteps.view(2, 4), found.timesteps.expand(2, 4))
    few = attached(make(steps=RandomSteps(0.5))).roll_out(BATCH)
    assert len(few) == 4 and len(set(few.keys)) == 4


@pytest.mark.parametrize("name", slow_after(1, ["sd35_tiny", "sd15"]))
@pytest.mark.parametrize("factor", ["velocity", "mean_match", "kl_exact"])
def test_the_loss_is_that_of_the_samplers_steps(name: str, factor: str) -> None:
    """Also by the means that the sampler makes of both outputs."""
    noise = {"eta": 1.0} if name == "sd15" else {"noise_level": 0.7}
    module = attached(make(name=name, sampling=Sampling(4, **noise), loss=OnPolicyLoss(factor)))
    moved(module)
    rows = module.roll_out(BATCH)
    teacher = guided(module, rows, 3.0)
    with torch.no_grad():
        output = module.prediction(rows)
    ours, theirs = (module.sampler.transition(rows.latents, one, rows.timesteps) for one in (output, teacher))
    squares = (ours.mean - theirs.mean).square().flatten(1).mean(dim=1)
    wanted = {"velocity": (output - teacher).square().flatten(1).mean(dim=1), "mean_match": squares / 2}
    wanted["kl_exact"] = squares / (2 * ours.std**2)
    torch.testing.assert_close(module.training_step(rows, 0).detach(), wanted[factor].mean(), rtol=1e-3, atol=1e-7)


def test_an_adapter_teaches_what_it_predicts(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    """As on a policy that has learned the same; its weights are in no checkpoint of the student."""
    path, weights = checkpoint
    module = attached(make(Teacher(str(path))))
    rows = module.roll_out(BATCH)
    other = source("sd35_tiny", rank=2).load()
    for name, weight in other.network.named_parameters():
        if ".policy." in name:
            weight.data.copy_(weights[name.replace(".policy.", ".")])
    with torch.no_grad():
        want = other.predict(rows.latents, rows.timesteps, other.encode_prompts(rows.prompts))
        plain = module.prediction(rows)
    found = module.corrections(rows)
    torch.testing.assert_close(found[0], want, rtol=1e-4, atol=1e-5)
    assert (plain - want).abs().max() > 1e-3
    assert not any(".teacher0." in name for name in module.state_dict())


def test_an_adapter_stays_as_trained_where_frozen_weights_are_rounded(
    checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """The run's family is not imported, whatever it is: only its adapter is read."""
    path, weights = checkpoint
    content = torch.load(path, weights_only=True)
    content["policy_source"]["family"] = "elsewhere.Family"
    torch.save(content, tmp_path / "own.ckpt")
    policy = replace(source("sd35_tiny"), frozen_dtype="bfloat16")
    module = OnPolicyDistillationModule(policy, [Teacher(str(tmp_path / "own.ckpt"))], sampling=Sampling(4), seed=1)
    found = {name: one for name, one in module.policy.network.named_parameters() if ".teacher0." in name}
    assert found
    for name, weight in found.items():
        torch.testing.assert_close(weight, weights[name.replace(".teacher0.", ".")], rtol=0, atol=0)


def test_a_distilled_policy_learns_from_its_guided_base(tmp_path: Path) -> None:
    base, student = str(tmp_path / "base"), TWINS["klein_distilled"].source()
    shutil.copytree(student.source, base)
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index | {"is_distilled": False}))
    teacher = Teacher(pipeline=base, guidance_scale=4.0)
    teacher.check(student, None)
    assert teacher.scale(teacher.family(student), None) == 4.0
    with pytest.raises(InputError, match=r"^teachers: pipeline=.*: guidance_scale=0.5 must be at least 1"):
        Teacher(pipeline=base, guidance_scale=0.5).check(student, None)
    with pytest.raises(InputError, match=r"^teachers: guidance_scale=4, but FLUX.2-klein .* was distilled"):
        Teacher(guidance_scale=4.0).check(student, None)


def test_another_pipeline_teaches_with_the_policys_text() -> None:
    """The pipeline here is the policy's own: there is nothing to learn without an adapter, and something with one."""
    module = attached(make(Teacher(pipeline=source_of("sd35_tiny"))))
    rows = module.roll_out(BATCH)
    assert module.training_step(rows, 0).item() < 1e-10
    moved(module)
    assert module.training_step(rows, 0).item() > 1e-5


@pytest.mark.slow
def test_a_policy_comes_near_its_teacher(tmp_path: Path) -> None:
    """Its samples without guidance come nearer to those of the guided base, from the same noise."""
    module = make(optimizer=lambda groups: torch.optim.Adam(groups, lr=5e-3), loss=OnPolicyLoss("velocity"))
    data = loaders(batch_size=8, batches_per_epoch=30)
    make_trainer(tmp_path, max_steps=30, max_epochs=-1).fit(module, datamodule=data)
    fixed = PromptBatch(PROMPTS * 4, tuple(f"fixed/{number}" for number in range(8)))
    policy, off = module.policy.eval(), module.guidance_scale
    with torch.no_grad():
        new, old, wanted = (
            sample_latents(policy, fixed, module.sampling, scale, 0, reference)
            for scale, reference in ((off, False), (off, True), (3.0, True))
        )
    assert (new - wanted).square().mean() < 0.85 * (old - wanted).square().mean()


def test_a_pipeline_of_another_noise_schedule_is_refused(tmp_path: Path) -> None:
    """It would be asked for outputs of another kind; a flow's scheduler changes no velocity."""
    folder = Path(shutil.copytree(pipeline_folder("sd15"), tmp_path / "other"))
    config = folder / "scheduler" / "scheduler_config.json"
    Teacher(pipeline=str(folder), guidance_scale=3.0).check(source("sd15"), 1.0)
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "v_prediction"}))
    with pytest.raises(InputError, match="has another scheduler than the policy"):
        Teacher(pipeline=str(folder), guidance_scale=3.0).check(source("sd15"), 1.0)


def test_an_adapter_of_other_frozen_weights_is_refused(
    checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    content = torch.load(checkpoint[0], weights_only=True)
    content["base"]["values"] += 1.0
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"the checkpoint belongs to the base .* differs from that of"):
        make(Teacher(str(tmp_path / "other.ckpt")))
