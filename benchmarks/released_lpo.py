"""LPO's rollout and update on both sides, for ``released_alignment.py``."""

import ast
import copy
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from random_pipelines import RandomLatentReward, RandomPipeline, RandomPolicy, pipeline_folder
from released import Works, released_lrm
from released_policies import RATE, StoredText, own_update, prepared, prompts_of
from released_scripts import part_of, script
from torch import nn
from torch.optim import AdamW

from latentreward.alignment import LPOModule, Policy, QuantileThreshold, Sampling
from latentreward.core.contracts import take_rows
from latentreward.diffusion import LoRA

STEPS = 20
"""Steps of a rollout; the released thresholds are those of 20 steps."""


def released_pipeline(size: str, policy: Policy) -> tuple[Any, nn.Module]:
    """Return diffusers' pipeline with the weights and the adapter of a policy, and the network without adapter."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from peft import LoraConfig

    network = policy.network
    weights = {name.replace(".policy.", ".default."): weight for name, weight in network.state_dict().items()}
    plain = {name.replace(".base_layer.", "."): weight for name, weight in weights.items() if ".lora_" not in name}
    reference = type(network).from_config(network.config).requires_grad_(False)
    reference.load_state_dict(plain)
    unet = copy.deepcopy(reference)
    endings = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=endings))
    unet.load_state_dict(weights)
    scheduler = DDIMScheduler.from_config(RandomPipeline(pipeline_folder(size)).config("scheduler"))
    scheduler.set_timesteps(STEPS)
    text: Any = policy.text_encoder
    vae, image_parts = policy.vae.vae, {"safety_checker": None, "feature_extractor": None}
    pipeline = StableDiffusionPipeline(
        vae, text.text_encoder, text.tokenizer, unet, scheduler, **image_parts, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, reference


def lpo(part: str, size: str, batch: int, root: Path | None) -> Works:
    """Return the sides of LPO's rollout of some prompts, or of its update on as many pairs.

    The released reward model encodes the prompts of all candidates at every step; in the part ``rollout, prompts
    given`` its text encoder keeps its output.
    """
    policy = RandomPolicy(source=size, lora=LoRA(4, 4.0))
    settings: dict[str, Any] = {"sampling": Sampling(STEPS), "guidance_scale": 5.0, "seed": 0}
    module = prepared(LPOModule(policy, RandomLatentReward(size), QuantileThreshold(0.0), **settings))
    prompts = prompts_of(batch)
    if part != "update":
        works: Works = {"ours": lambda: module.roll_out(prompts)}
    else:
        found = module.roll_out(prompts)
        module.prepare_prompts(prompts.prompts)
        # At all noise levels: rows are ordered by step.
        pairs = take_rows(found, range(0, len(found), len(found) // batch)[:batch])
        works = {"ours": own_update(module, [pairs], clip=False)}
    if root is None:
        return works
    from lpo.preference_models.compare_funcs import preference_score_compare
    from lpo.preference_models.models.sd15_preference_model import SD15PreferenceModel
    from lpo.preference_models.models.unet_2d_condition_reward import UNet2DConditionModel

    pipeline, reference = released_pipeline(size, module.policy)
    unet, text, model = pipeline.unet, pipeline.text_encoder, module.reward.model
    model.backbone.vae = module.policy.vae
    scorer = released_lrm(SD15PreferenceModel, UNet2DConditionModel, model).eval().requires_grad_(False)
    if part == "rollout, prompts given":
        scorer.text_encoder = StoredText(scorer.text_encoder)
    released = script(root, "LPO", "lpo/train_scripts/train_lpo.py")
    empty, ids = scorer.neg_prompt_ids, scorer.encode_prompt(list(prompts.prompts))

    @torch.no_grad()
    def sample() -> None:
        unet.eval()
        released.multi_sample_pipeline(
            pipeline,
            prompt_embeds=text(ids)[0],
            negative_prompt_embeds=text(empty)[0].repeat(batch, 1, 1),
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            eta=1.0,
            num_samples_each_step=module.candidates.num_candidates,
            preference_model_fn=lambda latents, extra: scorer.get_preference_score(
                latents, extra["input_ids"], extra["timesteps"]
            ),
            compare_fn=partial(preference_score_compare, threshold=-1.0),  # every pair is kept
            extra_info={"input_ids": ids.repeat(module.candidates.num_candidates, 1)},
        )
        unet.train()

    if part != "update":
        return works | {"theirs": sample}
    from accelerate import Accelerator

    train = SimpleNamespace(train_batch_size=batch, cfg=True, eps=0.1, beta=500.0, max_grad_norm=1.0)
    config = SimpleNamespace(train=train, sample=SimpleNamespace(guidance_scale=5.0, eta=1.0))
    with torch.no_grad():
        embeds, negative = text(scorer.encode_prompt(list(pairs.prompts)))[0], text(empty)[0]
    side = {"prompt_embeds": embeds, "timesteps": pairs.timesteps.long(), "latents": pairs.latents}
    accelerator = Accelerator(cpu=True)
    trained = [weight for weight in unet.parameters() if weight.requires_grad]
    unet, optimizer = accelerator.prepare(unet.train(), AdamW(trained, RATE))
    names = {
        "config": config,
        "unet": unet,
        "ref": reference,
        "pipeline": pipeline,
        "optimizer": optimizer,
        "accelerator": accelerator,
        "autocast": nullcontext,
        "neg_prompt_embed": negative,
        "num_train_batches": 1,
        "trainable_para": iter(()),  # as in the released run, where the iterator is used up
        "epoch": 0,
        "sample_0": {**side, "next_latents": pairs.chosen},
        "sample_1": {**side, "next_latents": pairs.rejected},
    }
    update = part_of(released, ast.For, "range(num_train_batches)")
    return works | {"theirs": lambda: update(names)}
