"""Diffusion-DPO's module: against the formula on whole networks, batches and sides, data of all kinds, training."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from latentreward.alignment import DiffusionDPOModule, RolloutDraws
from latentreward.core.contracts import Conditioning, ImageRef, PreferenceBatch
from latentreward.core.errors import InputError
from latentreward.data import LoadedPair, collate_pairs
from latentreward.diffusion import ConstantSigma
from latentreward.reward.modules.reward import PairDraws
from tests.alignment.modules.batches import loaded_pairs, pixel_batch, rows
from tests.alignment.policies.alignment import tiny_source
from tests.marks import rotated_after
from tests.oracles import alignment_losses as oracle

POLICIES = ("sd15", "sd21", "sdxl", "sd35")
CERTAIN = (1.0, 0.0, 1.0)


def dpo(name: str = "sd15", moved: float = 0.05, policy: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    module = DiffusionDPOModule(tiny_source(name, **(policy or {})), **{"beta": 50.0, "seed": 1, **options})
    with torch.no_grad():
        for parameter in adapter(module):
            parameter.add_(moved * torch.randn_like(parameter))
    module.logged = {}
    module.log = lambda name, value, **_: module.logged.__setitem__(name, float(torch.as_tensor(value).detach()))
    return module


def adapter(module: DiffusionDPOModule) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.policy.network.parameters() if parameter.requires_grad]


def weighted_batch(count: int, labels: tuple[float, ...] = CERTAIN) -> PreferenceBatch:
    batch = pixel_batch(count, labels=labels)
    return replace(batch, weight=torch.ones(count))


def slow_loss(module: DiffusionDPOModule, batch: PreferenceBatch) -> float:
    """The paper's loss, each image in a pass of its own."""
    policy, draws = module.policy, PairDraws(batch, module.seed, 0)
    process = policy.noise_process
    encoded = module.encode(batch, draws)
    latents, noise, conditioning = encoded.latents, encoded.noise, encoded.conditioning
    timesteps = draws.timesteps(module.levels, process, per_image=False)
    columns: list[list[Tensor]] = [[], [], []]
    for i in range(len(latents)):
        row = slice(i, i + 1)
        noisy = process.add_noise(latents[row], noise[row], timesteps[row])
        columns[0].append(policy.predict(noisy, timesteps[row], conditioning.select([i])))
        with policy.reference():
            columns[1].append(policy.predict(noisy, timesteps[row], conditioning.select([i])))
        columns[2].append(process.target(latents[row], noise[row], timesteps[row]))
    return oracle.diffusion_dpo(*(torch.cat(column).double().numpy() for column in columns), module.beta)


# the loss


@pytest.mark.parametrize("name", rotated_after(2, POLICIES))
def test_loss_is_the_papers(name: str) -> None:
    module, batch = dpo(name), weighted_batch(3)
    with torch.no_grad():
        loss = module.training_step(batch, 0)
        assert loss.item() == pytest.approx(slow_loss(module, batch), rel=2e-3)


def test_gradient_is_the_slope_of_the_loss() -> None:
    module, batch = dpo(), weighted_batch(3)
    module.training_step(batch, 0).backward()
    slopes = [parameter.grad.clone() for parameter in adapter(module)]
    size = torch.cat([slope.flatten() for slope in slopes]).norm()
    values = []
    for step in (1e-2, -2e-2):
        for parameter, slope in zip(adapter(module), slopes, strict=True):
            parameter.data.add_(slope / size, alpha=step)
        values.append(module.training_step(batch, 0).item())
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(size.item(), rel=1e-2)


def test_a_soft_label_weighs_both_orders() -> None:
    module, batch = dpo(), rows(weighted_batch(1), [0])
    certain = module.training_step(batch, 0).item()
    margin = module.logged["train/margin"]
    soft = module.training_step(replace(batch, label=torch.tensor([0.8])), 0).item()
    assert soft == pytest.approx(certain + 0.2 * margin, rel=1e-5)


def test_images_of_a_pair_share_noise_and_timestep() -> None:
    module, seen = dpo(), []
    module.policy.network.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    batch = weighted_batch(3)
    same = replace(batch, rejected=batch.chosen, rejected_keys=batch.chosen_keys)
    module.training_step(same, 0)
    for noisy, timesteps in seen:
        torch.testing.assert_close(*noisy.chunk(2))
        assert torch.equal(*timesteps.chunk(2))
        assert len(timesteps.unique()) > 1
    assert module.logged["train/margin"] == pytest.approx(0, abs=1e-4)


# batches, ties, kinds of data


def test_pairs_compare_alike_in_any_batch() -> None:
    module, batch = dpo(), weighted_batch(4)
    whole = module.training_step(batch, 0)
    parts = [module.training_step(rows(batch, [i]), 0) for i in range(4)]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-4, atol=1e-5)


def test_ties_and_unlabelled_pairs_take_no_part() -> None:
    module = dpo()
    with_ties = replace(pixel_batch(4, labels=(1.0, 0.5, 0.0, 1.0)), weight=torch.tensor([1.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(
        module.training_step(with_ties, 0), module.training_step(rows(with_ties, [0, 2]), 0), rtol=1e-4, atol=1e-5
    )
    ties = replace(pixel_batch(2, labels=(0.5,)), weight=torch.ones(2))
    loss = module.training_step(ties, 0)
    loss.backward()
    assert loss == 0
    assert all(not parameter.grad.any() for parameter in adapter(module))


def test_cached_latents_and_prompts() -> None:
    module, batch = dpo(), weighted_batch(3)
    encoded = module.encode(batch, PairDraws(batch, module.seed, 0))
    conditioning, (chosen, rejected) = encoded.conditioning, encoded.latents.chunk(2)
    cached = replace(
        batch,
        chosen=chosen,
        rejected=rejected,
        latent_space=module.policy.latent_space,
        conditioning=Conditioning(conditioning.prompt_embeds[:3], conditioning.pooled_prompt_embeds[:3]),
    )
    module.policy.text_encoder = module.policy.vae = None
    torch.testing.assert_close(module.training_step(cached, 0), dpo().training_step(batch, 0))


# noise that images were generated from

NOISES = ("4 0/0 4x8x8", "4 0/1 4x8x8", "4 1/0/2 4x8x8", "5 0/0 4x8x8")


def generated_batch(labels: tuple[float, ...] = (1.0, 0.0), missing: int | None = None) -> PreferenceBatch:
    """Two pairs of images with their noises, one side of ``missing`` without; the second's b is the chosen one."""
    pairs = loaded_pairs(2, labels=labels)
    named = []
    for row, loaded in enumerate(pairs):
        a, b = (replace(image, noise=NOISES[2 * row + side]) for side, image in enumerate(images_of(loaded)))
        named.append(replace(loaded.pair, image_a=a, image_b=replace(b, noise=None) if row == missing else b))
    return collate_pairs([replace(loaded, pair=pair) for loaded, pair in zip(pairs, named, strict=True)])


def images_of(loaded: LoadedPair) -> tuple[ImageRef, ImageRef]:
    return loaded.pair.image_a, loaded.pair.image_b


def test_each_image_gets_the_noise_it_was_generated_from() -> None:
    module = dpo("sd35_no_t5", prior_noise=True)
    batch = replace(generated_batch(), weight=torch.ones(2))
    noise = module.encode(batch, PairDraws(batch, 0, 0)).noise
    keys = [("0/0", 4), ("0/0", 5), ("0/1", 4), ("1/0/2", 4)]
    drawn = [RolloutDraws(seed, [key]).initial((4, 8, 8)) for key, seed in keys]
    assert torch.equal(noise, torch.cat(drawn))
    with torch.no_grad():
        loss = module.training_step(batch, 0).item()
        assert loss == pytest.approx(slow_loss(module, batch), rel=2e-3)
        assert loss != pytest.approx(dpo("sd35_no_t5").training_step(batch, 0).item(), rel=1e-2)


def test_an_unlabelled_pair_needs_no_noise() -> None:
    module, batch = dpo("sd35_no_t5", prior_noise=True), generated_batch((1.0, None), missing=1)
    torch.testing.assert_close(module.training_step(batch, 0), module.training_step(rows(batch, [0]), 0))


@pytest.mark.parametrize(
    ("noise", "key"),
    [((), "pair pair0"), ((NOISES[0], None), "pair pair1"), (("[0]", NOISES[0]), "names no noise")],
)
def test_pairs_without_their_noise_are_refused(noise: tuple[str | None, ...], key: str) -> None:
    batch = replace(generated_batch(), chosen_noise=noise, rejected_noise=noise)
    with pytest.raises(InputError) as caught:
        dpo("sd35_no_t5", prior_noise=True).training_step(batch, 0)
    assert key in str(caught.value)


# training


def brighter_is_better(items: Sequence[LoadedPair]) -> PreferenceBatch:
    batch = collate_pairs(items)
    return replace(batch, chosen=batch.chosen / 4 + 0.7, rejected=batch.rejected / 4 - 0.7)


@pytest.mark.slow
def test_training_learns_its_pairs_and_validation_sees_it() -> None:
    module = DiffusionDPOModule(
        tiny_source("sd35_no_t5"),
        beta=200.0,
        levels=ConstantSigma(0.5),
        eval_timesteps=(500,),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        seed=0,
    )
    before = {key: value.clone() for key, value in module.state_dict().items()}
    pairs = DataLoader(loaded_pairs(4, labels=CERTAIN), batch_size=4, collate_fn=brighter_is_better)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=15,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=15,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, pairs, pairs)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["val/implicit_accuracy"] == 1.0
    assert metrics["val/margin"] > 0
    assert metrics["val/loss"] < 0.68
    changed = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all("lora" in key for key in changed)
