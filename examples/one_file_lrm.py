"""LRM (arXiv:2502.01051) in one file: a U-Net of Stable Diffusion learns to score noisy latents.

    python examples/one_file_lrm.py --steps 300 --output runs/one_file_lrm

runs on a CPU, with the tiny Stable Diffusion and the tiny world that come with the package. `latentreward fit` computes
the same step (`latentreward.reward.LRMModule`) and adds configs, resuming, several GPUs, metrics and refusals.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from latentreward.core.contracts import PreferenceBatch
from latentreward.core.registry import create_backbone
from latentreward.reward import CLIPProjectionHead, RewardModel, lrm_pair_loss
from latentreward.tinyworld import TinyWorldDataModule

TRAINED_AT = torch.arange(1, 1000, 50)  # the paper's timesteps 1, 51, ..., 951
JUDGED_AT = (1, 251, 501, 801)


def score_pairs(model: RewardModel, batch: PreferenceBatch, timesteps: Tensor, generator: torch.Generator) -> Tensor:
    """Noise both images of B pairs to timesteps `(B,)`, and score them: `(2, B)`, chosen images first."""
    backbone, process = model.backbone, model.backbone.noise_process
    pixels = torch.cat([batch.chosen, batch.rejected])  # (2B, 3, H, W) in [-1, 1]
    latents = model.encode_images(pixels)  # (2B, C, h, w), multiplied by the VAE's scaling factor
    noise = torch.randn(latents.shape, generator=generator)  # another one for each image, as in the paper
    both = timesteps.repeat(2)
    noisy = process.add_noise(latents, noise, both)
    # The empty prompt is for visual feature enhancement, eq. 6: it makes alignment with the text count more.
    prompts, uncond = model.encode_prompts(batch.prompts)
    features = backbone(noisy, both, prompts.select([*range(len(batch))] * 2), uncond)  # of down and mid blocks, text
    return model.head(features).view(2, len(batch))


def train(model: RewardModel, data: TinyWorldDataModule, steps: int, seed: int) -> None:
    """Train U-Net, text encoder and head for a number of steps, one batch each."""
    generator = torch.Generator().manual_seed(seed)
    weights = [weight for weight in model.parameters() if weight.requires_grad]  # the VAE is frozen
    optimizer = torch.optim.AdamW(weights, lr=5e-4, weight_decay=0.01)
    step = 0
    while step < steps:
        for batch in data.train_dataloader():
            place = torch.randint(len(TRAINED_AT), (len(batch),), generator=generator)
            chosen, rejected = score_pairs(model, batch, TRAINED_AT[place].float(), generator)
            # Cross-entropy over the two images; a label of 0.5 is a tie. Weights are 1 unless the data give others.
            losses = lrm_pair_loss(chosen - rejected, batch.label)
            loss = (losses * batch.weight).sum() / batch.weight.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            step += 1
            if step % 20 == 0 or step == steps:
                print(f"step {step}: loss {loss.item():.4f}", flush=True)
            if step == steps:
                return


@torch.no_grad()
def accuracies(model: RewardModel, data: TinyWorldDataModule, seed: int) -> dict[int, float]:
    """Compute the share of held-out pairs that are ranked as labelled, by timestep; ties are left out."""
    model.eval()
    found = {}
    for timestep in JUDGED_AT:
        generator, right, total = torch.Generator().manual_seed(seed), 0, 0
        for batch in data.val_dataloader():
            chosen, rejected = score_pairs(model, batch, torch.full((len(batch),), float(timestep)), generator)
            decided = batch.label > 0.5
            right += int(((chosen > rejected) & decided).sum())
            total += int(decided.sum())
        found[timestep] = right / total
    return found


def main(args: Sequence[str] | None = None) -> None:
    """Train, print the accuracy by timestep, and save the reward model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--output", type=Path, default=Path("runs/one_file_lrm"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(args)

    torch.manual_seed(given.seed)  # of the head's initial weights
    pairs = {"train_pairs": given.pairs, "val_pairs": given.pairs // 30}
    data = TinyWorldDataModule(str(given.output / "pairs"), **pairs, batch_size=32, num_workers=0, seed=given.seed)
    data.setup("fit")
    backbone = create_backbone("sd_tiny")  # with "sd15" and source=FOLDER the same code trains LRM-SD1.5
    model = RewardModel(backbone, CLIPProjectionHead(backbone.feature_spec, guidance=7.5)).train()
    train(model, data, given.steps, given.seed)
    for timestep, accuracy in accuracies(model, data, given.seed).items():
        print(f"timestep {timestep}: {accuracy:.3f} of the held-out pairs are ranked as labelled")
    model.save_pretrained(given.output / "reward")
    print(f"{given.output / 'reward'}: scores pictures by `latentreward score`, aligns by one_file_lpo.py")


if __name__ == "__main__":
    main()
