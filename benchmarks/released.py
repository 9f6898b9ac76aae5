"""Measure scoring and training steps against the released code of LRM and DiNa-LRM; prints a Markdown table.

    python benchmarks/released.py [--released DIR] [--sizes mid mid_sd35] [--batch 8] [--repeats 5]

DIR holds clones of github.com/Kwai-Kolors/LPO and github.com/HKUST-C4G/diffusion-rm, named ``LPO`` and
``diffusion-rm``. Their modules are imported as they are and get this project's random weights; what they import and
this project does not need (wandb, torchvision, hydra, …) is replaced by stand-ins. Without DIR, this file's own loop
over the same parts takes their place, and the table says so. Everything runs in float32.

Scoring takes the same latents, prompts and noise levels on both sides; text embeddings of DiNa-LRM are given. "Not
invariant" is our scoring with the parts switched off that make a score independent of its batch: the head then takes
all rows at once. A training step is forward, backward, clipping and AdamW on the same batch: LRM on pixels, DiNa-LRM on
latents with LoRA; the released code passes the two sides of a pair through the network one after the other.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from measuring import Goal, interleaved, ratio, table
from PIL import Image
from random_pipelines import SD35_TOKENS, SIZES, RandomPipeline, pipeline_folder
from released_scripts import add_released
from scoring import bare_loop, random_model
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning, PreferenceBatch
from latentreward.diffusion import LoRA, SD3DiTBackbone, SDUNetBackbone
from latentreward.diffusion.backbones.fused_lora import fuse_lora
from latentreward.diffusion.backbones.tuning import tune
from latentreward.reward import (
    CLIPProjectionHead,
    DiNaLRMModule,
    GatedQFormerHead,
    LRMModule,
    RewardModel,
    ScoringNoise,
)

ENSEMBLE = (0.2, 0.5, 0.7)
Works = dict[str, Callable[[], Any]]


def heading(released: bool) -> str:
    """Return what a column with the other side's times says."""
    return "released code" if released else "our rewrite of the released loop"


def optimiser_step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Do what follows the loss in a training step."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def own_step(module: Any, batch: PreferenceBatch) -> Callable[[], None]:
    """Return our training step without a trainer."""
    parameters = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-6)
    return lambda: optimiser_step(parameters, optimizer, module.training_step(batch, 0)["loss"])


def rewritten_step(module: Any, batch: PreferenceBatch, sides: int) -> Callable[[], None]:
    """Return a training step of bare calls; ``sides`` is the number of passes for the two sides of a pair."""
    parameters = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer, backbone = torch.optim.AdamW(parameters, 1e-6), module.model.backbone

    def work() -> None:
        images = torch.cat([batch.chosen, batch.rejected])
        latents = images if batch.latent_space else backbone.vae.encode(images)
        timesteps = torch.full((len(latents),), 501.0)
        noisy = backbone.noise_process.add_noise(latents, torch.randn_like(latents), timesteps)
        if batch.conditioning is None:
            encoded, uncond = module.model.encode_prompts(batch.prompts)
        else:
            encoded, uncond = batch.conditioning, None
        if sides == 1:
            scores = module.model(noisy, timesteps, encoded.select([*range(len(batch))] * 2), uncond)
        else:
            passes = zip(noisy.chunk(2), timesteps.chunk(2), strict=True)
            scores = torch.cat([module.model(x, t, encoded, uncond) for x, t in passes])
        chosen, rejected = scores.chunk(2)
        optimiser_step(parameters, optimizer, -nn.functional.logsigmoid(chosen - rejected).mean())

    return work


def own_scoring(model: RewardModel, noise: ScoringNoise, given: Conditioning | None, latents: Tensor) -> Works:
    """Return our scoring of latents, with and without invariance."""
    prompts = [f"prompt {number}" for number in range(len(latents))]

    def score() -> Tensor:
        conditioning = None if given is None else (given, None)
        return model.score_latents(prompts, latents, noise=noise, conditioning=conditioning, batch_size=len(latents))

    def not_invariant() -> Tensor:
        with patch("latentreward.reward.scoring.ensemble.even_step", lambda model: 1):
            return score()

    return {"ours": score, "not invariant": not_invariant}


# --- LRM -----------------------------------------------------------------------------------------------------------


def released_lrm(kind: type[Any], unet: type[Any], model: RewardModel) -> Any:
    """Return the released LRM of SD1.5 with the weights of ``model``, whose widths may be others than SD1.5's."""
    from diffusers import DDPMScheduler

    theirs, backbone = kind.__new__(kind), model.backbone
    nn.Module.__init__(theirs)
    theirs.cfg = SimpleNamespace(multi_scale=True, multi_scale_cfg=False, guidance_scale=model.head.guidance)
    theirs.do_classifier_free_guidance, theirs.avg_pool = True, nn.AdaptiveAvgPool2d((1, 1))
    theirs.tokenizer, theirs.text_encoder = backbone.text_encoder.tokenizer, backbone.text_encoder.text_encoder
    theirs.vae, theirs.scheduler = backbone.vae.vae, DDPMScheduler(beta_schedule="scaled_linear")
    theirs.unet = unet.from_config(backbone.unet.config)
    theirs.unet.load_state_dict(backbone.unet.state_dict(), strict=False)
    theirs.visual_projection, theirs.text_projection = model.head.visual_projection, model.head.text_projection
    theirs.logit_scale = model.head.logit_scale
    theirs.neg_prompt_ids = theirs.encode_prompt([""])
    return theirs


def lrm_module(size: str) -> LRMModule:
    """Return LRM's module at a size, all weights trained."""
    source = RandomPipeline(pipeline_folder(size))
    text, vae = source.clip_prompts(False), source.latent_encoder()
    parts = (source.unet(), source.noise_process(), source.latent_space())
    return LRMModule(SDUNetBackbone(*parts, text_encoder=text, vae=vae), CLIPProjectionHead, seed=0)


def lrm_scoring(size: str, batch: int, released: bool) -> Works:
    """Return the sides of scoring by LRM, with B prompts."""
    model = lrm_module(size).model.eval().requires_grad_(False)
    backbone, latents = model.backbone, noisy_latents(size, batch)
    prompts, timesteps = [f"prompt {number}" for number in range(batch)], torch.full((batch,), 501.0)
    works = own_scoring(model, ScoringNoise(timesteps=(501.0,)), None, latents)
    noisy = backbone.noise_process.add_noise(latents, torch.randn_like(latents), timesteps)
    if not released:
        return works | {"theirs": lambda: model(noisy, timesteps, *model.encode_prompts(prompts))}
    from lpo.preference_models.models.sd15_preference_model import SD15PreferenceModel
    from lpo.preference_models.models.unet_2d_condition_reward import UNet2DConditionModel

    theirs = released_lrm(SD15PreferenceModel, UNet2DConditionModel, model).eval()
    ids = theirs.encode_prompt(prompts)
    return works | {"theirs": lambda: theirs.get_preference_score(noisy, ids, timesteps)}


def lrm_step(size: str, batch: int, released: bool) -> Works:
    """Return the sides of a training step of LRM on pixels."""
    module = lrm_module(size).train()
    height, width = module.model.backbone.native_size
    pixels = torch.rand(2, batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pairs = made_pairs(*pixels)
    ours = {"ours": own_step(module, pairs)}
    if not released:
        return ours | {"theirs": rewritten_step(lrm_module(size).train(), pairs, sides=1)}
    from trainer.criterions.step_clip_criterion import StepCLIPCriterion
    from trainer.models.sd15_preference_model import SD15PreferenceModel
    from trainer.models.unet_2d_condition_reward import UNet2DConditionModel

    theirs = released_lrm(SD15PreferenceModel, UNet2DConditionModel, lrm_module(size).model).train()
    names = {name: name for name in ("label_0", "label_1", "input_ids", "pixels_0", "pixels_1", "timestep")}
    columns = {f"{key}_column_name": name for key, name in (names | {"num_examples_per_prompt": "number"}).items()}
    criterion = StepCLIPCriterion(
        SimpleNamespace(is_distributed=False, loss_type="pair", aux_loss_coeff=1.0, **columns)
    )
    ones = torch.ones(batch)
    given = {"label_0": ones, "label_1": 0 * ones, "number": ones, "pixels_0": pixels[0], "pixels_1": pixels[1]}
    given |= {"input_ids": theirs.encode_prompt(list(pairs.prompts)), "timestep": torch.full((batch, 2), 501)}
    parameters = [weight for weight in theirs.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-6)
    return ours | {"theirs": lambda: optimiser_step(parameters, optimizer, criterion(theirs, given))}


def lrm_files(size: str, batch: int, count: int, released: bool) -> Works:
    """Return the sides of decoding, encoding and scoring JPEGs of the native size, two for each prompt, from disk."""
    model, folder = random_model(size), Path(tempfile.mkdtemp(prefix="released_"))
    height, width = model.backbone.native_size
    rng, files = np.random.default_rng(0), [folder / f"{number:04d}.jpg" for number in range(count)]
    for file in files:
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, quality=95)
    prompts = [f"picture {number // 2} of noise" for number in range(count)]
    ours = {"ours": lambda: model.score(prompts, files, batch_size=batch)}
    if not released:
        return ours | {"theirs": lambda: bare_loop(model, prompts, [file.read_bytes() for file in files], batch)}
    from trainer.models.sd15_preference_model import SD15PreferenceModel
    from trainer.models.unet_2d_condition_reward import UNet2DConditionModel

    theirs = released_lrm(SD15PreferenceModel, UNet2DConditionModel, model).eval().requires_grad_(False)

    def transform(image: Image.Image) -> Tensor:
        """Do what torchvision's Resize, ToTensor and Normalize do; the released size is 512."""
        resized = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
        return torch.from_numpy(resized).permute(2, 0, 1).contiguous().float().div(255).sub_(0.5).div_(0.5)

    theirs.val_transform = transform

    @torch.no_grad()
    def score() -> None:
        for start in range(0, count, batch):  # as get_preference_scores, whose batch is the images of one prompt
            pixels = theirs.preprocess_image([str(file) for file in files[start : start + batch]])
            ids, timesteps = theirs.encode_prompt(prompts[start : start + batch]), torch.full((len(pixels),), 501)
            text, image = (embeds / embeds.norm(dim=-1, keepdim=True) for embeds in theirs(ids, pixels, timesteps))
            (theirs.logit_scale.exp() * (text * image).sum(dim=-1)).tolist()

    return ours | {"theirs": score}


def noisy_latents(size: str, batch: int) -> Tensor:
    """Return standard normal latents of the size's native shape."""
    network, vae = SIZES[size].get("unet") or SIZES[size]["transformer"], SIZES[size]["vae"]
    shape = (batch, vae["latent_channels"], network["sample_size"], network["sample_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def made_pairs(chosen: Tensor, rejected: Tensor, **more: Any) -> PreferenceBatch:
    """Return pairs of given images, each with a prompt of its own."""
    names = tuple(f"{number}" for number in range(len(chosen)))
    prompts, keys = tuple(f"prompt {name}" for name in names), [tuple(side + n for n in names) for side in "ab"]
    ones = torch.ones(len(chosen))
    return PreferenceBatch(names, prompts, chosen, rejected, *keys, ones, ones, **more)


# --- DiNa-LRM ------------------------------------------------------------------------------------------------------


def dina_module(size: str, lora: bool = False) -> DiNaLRMModule:
    """Return DiNa-LRM's module on 12 blocks at a size, without encoders; with ``performance.fused_lora``."""
    source = RandomPipeline(pipeline_folder(size))
    parts = (source.transformer(), source.noise_process(), source.latent_space())
    backbone = SD3DiTBackbone(*parts, num_layers=12)
    if lora:
        tune(backbone.transformer, "lora", LoRA(), backbone.unread())
        fuse_lora(backbone.transformer)
    return DiNaLRMModule(backbone, GatedQFormerHead, seed=0)


def given_prompts(batch: int) -> Conditioning:
    """Return random embeddings of B prompts, as long as SD3.5's."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(batch, SD35_TOKENS, 4096, generator=generator)
    return Conditioning(embeds, torch.randn(batch, 2048, generator=generator))


def released_dina(size: str, model: RewardModel, lora: bool) -> tuple[Any, Any]:
    """Return the released DiNa-LRM with the weights of ``model``, and its config."""
    from diffusion_rm.models.sd3_rm import SD3RewardModel
    from omegaconf import OmegaConf

    path = Path(sys.modules["diffusion_rm.models.sd3_rm"].__file__).parents[2] / "config/sd3m/thurstone-12layer.yaml"
    config, pipeline = OmegaConf.load(path), RandomPipeline(pipeline_folder(size))
    config.model.freeze_backbone = not lora
    encoders = {f"text_encoder{number}": nn.Identity() for number in ("", "_2", "_3")}
    tokenizers = {f"tokenizer{number}": None for number in ("", "_2", "_3")}
    parts = SimpleNamespace(transformer=pipeline.transformer(), **encoders, **tokenizers)
    theirs = SD3RewardModel(parts, config.model, torch.device("cpu"), torch.float32)
    theirs.reward_head.load_state_dict(model.head.state_dict())
    if not lora:
        theirs.backbone.load_state_dict(model.backbone.transformer.state_dict(), strict=False)
    return theirs, config


def dina_scoring(size: str, batch: int, released: bool, sigmas: tuple[float, ...]) -> Works:
    """Return the sides of scoring by DiNa-LRM with B prompts, at one noise level or an ensemble."""
    model = dina_module(size).model.eval().requires_grad_(False)
    process, latents, prompts = model.backbone.noise_process, noisy_latents(size, batch), given_prompts(batch)
    works = own_scoring(model, ScoringNoise(sigmas=sigmas), prompts, latents)
    timesteps = [t.repeat(batch) for t in process.timesteps_at(torch.tensor(sigmas))]

    def noisy() -> list[Tensor]:
        return [process.add_noise(latents, torch.randn_like(latents), t) for t in timesteps]

    def rewritten() -> None:
        levels = [model.backbone(x, t, prompts) for x, t in zip(noisy(), timesteps, strict=True)]
        model.head.score_ensemble(levels) if len(levels) > 1 else model.head(levels[0])

    if not released:
        return works | {"theirs": torch.no_grad()(rewritten)}
    theirs, _ = released_dina(size, model, lora=False)
    theirs.eval()
    given = {"encoder_hidden_states": prompts.prompt_embeds, "pooled_projections": prompts.pooled_prompt_embeds}
    if len(sigmas) > 1:
        score = lambda: theirs.forward_ensemble(noisy(), ensemble_timesteps=timesteps, **given)  # noqa: E731
    else:
        score = lambda: theirs(noisy()[0], timesteps=timesteps[0], **given)  # noqa: E731
    return works | {"theirs": torch.no_grad()(score)}


def dina_step(size: str, batch: int, released: bool) -> Works:
    """Return the sides of a training step of DiNa-LRM on latents, with LoRA."""
    module, prompts = dina_module(size, lora=True).train(), given_prompts(batch)
    sides = [noisy_latents(size, batch) for _ in range(2)]
    space = module.model.backbone.latent_space
    pairs = made_pairs(*sides, latent_space=space, conditioning=prompts)
    ours = {"ours": own_step(module, pairs)}
    if not released:
        return ours | {"theirs": rewritten_step(dina_module(size, lora=True).train(), pairs, sides=2)}
    from accelerate import Accelerator
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusion_rm.train.engine import TrainingEngine

    theirs, config = released_dina(size, module.model, lora=True)
    given = {"encoder_hidden_states": prompts.prompt_embeds, "pooled_projections": prompts.pooled_prompt_embeds}
    theirs.encode_prompt = lambda prompts: given
    config.paths.save_dir = tempfile.mkdtemp(prefix="released_")
    optimizer = torch.optim.AdamW([weight for weight in theirs.parameters() if weight.requires_grad], 1e-6)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(RandomPipeline(pipeline_folder(size)).config("scheduler"))
    engine = TrainingEngine(theirs, optimizer, None, config, None, scheduler, Accelerator(cpu=True))
    batch_of_theirs = {"prompt": list(pairs.prompts), "latent_chosen": sides[0], "latent_reject": sides[1]}
    return ours | {"theirs": lambda: engine.train_step(dict(batch_of_theirs))}


def main() -> None:
    """Run the measurements and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--released", type=Path, metavar="DIR")
    parser.add_argument("--sizes", nargs=2, default=["mid", "mid_sd35"], help="of LRM and of DiNa-LRM")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=512, help="JPEGs that are scored from disk")
    parser.add_argument("--files", default="small", metavar="SIZE", help="of the LRM that scores JPEGs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=[], help="beginnings of names; by default all")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*self.log.*")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    released = bool(options.released) and all(add_released(options.released, name) for name in ("LPO", "diffusion-rm"))
    (lrm, dina), batch = options.sizes, options.batch
    cases: dict[str, Callable[[], Works]] = {
        f"LRM, scoring, {lrm}": partial(lrm_scoring, lrm, batch, released),
        f"LRM, {options.images} JPEGs, {options.files}": partial(
            lrm_files, options.files, batch, options.images, released
        ),
        f"LRM, training step, {lrm}": partial(lrm_step, lrm, batch // 2, released),
        f"DiNa-LRM, scoring, {dina}": partial(dina_scoring, dina, batch, released, (0.4,)),
        f"DiNa-LRM, scoring, ensemble of 3, {dina}": partial(dina_scoring, dina, batch, released, ENSEMBLE),
        f"DiNa-LRM, training step, {dina}": partial(dina_step, dina, batch // 2, released),
    }

    def rows() -> Iterator[list[Any]]:
        for name, make in cases.items():
            if not name.startswith(tuple(options.cases) or ""):
                continue
            times = interleaved(make(), options.repeats)
            share, plain = ratio(times["ours"], times["theirs"]), times.get("not invariant")
            bare = ["", ""] if plain is None else [plain, ratio(plain, times["theirs"])]
            yield [name, times["ours"], times["theirs"], share, Goal(share.median, most=1.0), *bare]

    columns = ("case", "ours, s", f"{heading(released)}, s", "ratio", "goal", "ours, not invariant, s", "ratio")
    table(f"Batches of {batch} images, one thread", columns, rows())


if __name__ == "__main__":
    main()
