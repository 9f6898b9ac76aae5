"""Facts of Ideogram 4 that the tests of all families cannot see."""

from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentreward.core.errors import InputError
from tests.diffusion.families.twins import PROMPTS, TWINS, noise_for

TWIN = TWINS["ideogram4"]


def test_guidance_is_refused_but_for_the_scale_that_is_off() -> None:
    family = TWIN.source().resolve_family()
    assert family.guidance(None) is None
    assert not family.needs_uncond(family.guidance(1.0))
    for scale in (0.0, 7.0):
        with pytest.raises(InputError, match=f"guidance_scale={scale:g}, but .* second network .*; leave it out, or"):
            family.guidance(scale)


def test_statistics_are_compared_in_the_order_of_flux2(tmp_path: Path) -> None:
    """Those of FLUX.2's VAE as they are would normalise other channels."""
    folder = Path(copytree(TWIN.folder, tmp_path / "pipeline"))
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes((Path(TWINS["klein_base"].folder) / "vae" / path.name).read_bytes())
    flux2 = TWINS["klein_base"].source().latent_space()
    assert TWIN.source().latent_space() == flux2 != TWIN.source(source=str(folder)).latent_space()
    weights = load_file(path)
    for name in ("bn.running_mean", "bn.running_var"):
        weights[name] = weights[name].view(-1, 4).T.flatten()
    save_file(weights, path)
    assert TWIN.source(source=str(folder)).latent_space() == flux2


def test_layers_of_text_run_on_the_tokens_of_the_prompt_alone() -> None:
    policy, seen = TWIN.source().load(), []
    policy.network.llm_cond_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    conditioning = policy.encode_prompts(PROMPTS)
    with torch.no_grad():
        policy.predict(noise_for(policy.latent_shape(*TWIN.size)), torch.tensor([300.0, 800.0]), conditioning)
    assert seen == [conditioning.prompt_embeds.shape]


def test_times_and_positions_stay_exact_in_bfloat16() -> None:
    """Of bfloat16, 1 − 0.001 and 1 − 0.0015 are one number, and the positions of an image's rows too."""
    policy = TWIN.source(frozen_dtype="bfloat16").load()
    network = policy.network
    assert network.input_proj.weight.dtype == torch.bfloat16
    latents, sigmas = noise_for(policy.latent_shape(*TWIN.size))[:1].expand(2, -1, -1, -1), torch.tensor([1e-3, 1.5e-3])
    conditioning, found = policy.encode_prompts([PROMPTS[0]] * 2), []
    network.adaln_proj.register_forward_hook(lambda module, inputs, output: found.append(output))
    network.layers[0].register_forward_pre_hook(lambda block, inputs: found.append(inputs[2]))
    with torch.no_grad():
        one, two = policy.predict(latents, 1000 * sigmas, conditioning)
    assert not torch.equal(*found[0]) and not torch.equal(one, two)
    assert network.rotary_emb.inv_freq.dtype == torch.float32
    rotary = torch.cat(found[1], dim=-1)[0, -96:]
    assert len(rotary.unique(dim=0)) == 96
