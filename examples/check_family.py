"""Compare a family of your own with its pipeline: ``python check_family.py SOURCE FAMILY`` (docs/families.md)."""

import inspect
import sys

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from latentreward.alignment import PolicySource, RolloutDraws, Sampling, sample_latents
from latentreward.core.contracts import PromptBatch
from latentreward.diffusion import FlowFamily, load_family_backbone

SOURCE, FAMILY = sys.argv[1:]  # a folder or hub id, and a class such as aura_flow.AuraFlow
PROMPTS = ("a cat", 'Two Dogs (brown) on a Hill, in the Rain: "Woof!"')


class Given(RolloutDraws):
    """Initial latents that the pipeline gets too."""

    def __init__(self, latents):
        self.latents = latents

    def initial(self, shape):
        return self.latents


def show(name, found, wanted):
    """Print the largest difference as a part of the largest value."""
    print(f"{name}: {(found - wanted).abs().max() / wanted.abs().max():.0e}")


policy = PolicySource(SOURCE, family=FAMILY).load().eval()
family, network = policy.family, policy.network
guidance = family.default_guidance
pipeline = DiffusionPipeline.from_pretrained(SOURCE)
if not family.flow:  # rollouts take DDIM's steps; it clips where a config says nothing
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
own = inspect.signature(type(pipeline).__call__).parameters.get("guidance_scale")
print(f"guidance: {guidance}, of the pipeline {own and own.default}")
text = policy.text_encoder(PROMPTS)  # both at once: prompts one by one would not show padding before a prompt
batch, (height, width) = PromptBatch(PROMPTS, keys=PROMPTS), family.native_size
for size in ((height, width), (height // 2, width)):  # what follows has the second size
    noise = torch.randn(len(PROMPTS), *family.latent_shape(*size), generator=torch.Generator().manual_seed(0))
    ours = sample_latents(
        policy, batch, Sampling(4, height=size[0], width=size[1]), guidance, seed=0, draws=Given(noise)
    )
    settings = {"num_inference_steps": 4, "output_type": "latent"}
    settings |= {} if guidance is None else {"guidance_scale": guidance}
    settings |= {"height": size[0], "width": size[1]}
    for row, prompt in enumerate(PROMPTS):
        theirs = pipeline(prompt=[prompt], latents=noise[row : row + 1], **settings).images  # of Wan: .frames
        show(f"latents of {prompt!r} at {size}", ours[row], theirs[0])
vae = family.load_latent_encoder()
with torch.no_grad():  # the picture of the last latents, and its latents
    image = pipeline(prompt=[prompt], latents=noise[row : row + 1], **{**settings, "output_type": "pt"}).images * 2 - 1
    show("image", vae.decode(theirs).clamp(-1, 1), image)
    encoded = pipeline.vae.encode(image)
    mean = encoded.latent_dist.mean if "latent_dist" in encoded else encoded.latent  # AutoencoderDC's are not random
    show("encoded", vae.unscale(vae.encode(image)), mean)


timesteps = torch.tensor([700.0, 300.0])
with torch.no_grad():
    both = family.predict(network, noise, timesteps, text, guidance)
if isinstance(family, FlowFamily):  # a U-Net's text is the same in all blocks
    options = {"visual_taps": [0, 2], "text_taps": [0], "tuning": "frozen"}
    reward = load_family_backbone(SOURCE, family=FAMILY, **options).eval()
    with torch.no_grad():
        one, other = (reward(latents, timesteps, text).text[0] for latents in (noise, -noise))
    show("text tokens", one, other)
with torch.no_grad():
    for row in (0, 1):  # without the other row's padding: training cuts off tokens that no mask of the batch contains
        given = noise[[row]], timesteps[[row]], text.select([row]).trimmed()
        show(f"row {row} alone", family.predict(network, *given, guidance), both[[row]])


def mean_square(latents):
    """Return the mean square of the first row's prediction."""
    return family.predict(network, latents, timesteps[:1], text.select([0]), guidance).square().mean()


policy.train()  # as in alignment
start = noise[:1].clone().requires_grad_()
mean_square(start).backward()
step = 0.1 * start.grad / start.grad.norm()
with torch.no_grad():
    slope = (mean_square(noise[:1] + step) - mean_square(noise[:1] - step)) / 2
show("gradient", (start.grad * step).sum(), slope)


def reached(output, module, names):
    """Return the weights of the named parts of a module that an output depends on, or "none"."""
    weights = {name: one for name, one in module.named_parameters() if any(f".{part}." in f".{name}" for part in names)}
    slopes = (
        torch.autograd.grad(output.sum(), [*weights.values()], retain_graph=True, allow_unused=True) if weights else ()
    )
    found = [name for name, slope in zip(weights, slopes, strict=True) if slope is not None and slope.abs().max() > 0]
    return ", ".join(found) or "none"


network.requires_grad_(True)
print("idle:", reached(family.predict(network, noise, timesteps, text, guidance).square(), network, family.idle))
