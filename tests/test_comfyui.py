"""ComfyUI's nodes in integrations/comfyui: conventions, workflow, conversion of latents, and the choice.

ComfyUI is not installed here. The stand-ins have the formulas of its ``comfy/model_sampling.py`` (EPS, CONST),
``comfy/samplers.py`` (``simple_scheduler``; what a sampler returns) and ``comfy/latent_formats.py``, 0.3.64 (a125cd8).
"""

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.core.errors import InputError
from latentreward.diffusion.noise.processes import DDPM, FlowMatching
from tests.alignment.modules.batches import MODULES
from tests.tiny_pipelines import source_of

FOLDER = Path(__file__).resolve().parents[1] / "integrations" / "comfyui"
VP, FLOW = DDPM((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)), FlowMatching(1000, 3.0)
SAMPLER = "model positive negative latent_image add_noise noise_seed steps cfg sampler_name scheduler start_at_step "
CORE = {  # nodes.py, comfy_extras/nodes_primitive.py and nodes_preview_any.py: outputs, inputs
    "CheckpointLoaderSimple": ("MODEL CLIP VAE", "ckpt_name"),
    "CLIPTextEncode": ("CONDITIONING", "clip text"),
    "EmptyLatentImage": ("LATENT", "width height batch_size"),
    "KSamplerAdvanced": ("LATENT", SAMPLER + "end_at_step return_with_leftover_noise"),
    "VAEDecode": ("IMAGE", "samples vae"),
    "SaveImage": ("", "images filename_prefix"),
    "PrimitiveStringMultiline": ("STRING", "value"),
    "PreviewAny": ("", "source"),
}
spec = importlib.util.spec_from_file_location("latentreward_comfyui", FOLDER / "__init__.py")  # as ComfyUI does
nodes: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nodes)
EPS = SimpleNamespace(
    sigmas=((1 - VP.alphas_cumprod) / VP.alphas_cumprod).sqrt(),
    noise_scaling=lambda sigma, noise, latent: latent + sigma * noise,
    inverse_noise_scaling=lambda sigma, latent: latent,
)
CONST = SimpleNamespace(
    sigmas=FLOW.sigmas.flip(0),
    noise_scaling=lambda sigma, noise, latent: sigma * noise + (1 - sigma) * latent,
    inverse_noise_scaling=lambda sigma, latent: latent / (1 - sigma),
)


def simple(sampling: Any, scheduler: str, steps: int) -> Tensor:
    return torch.stack([*(sampling.sigmas[-1 - i * 1000 // steps] for i in range(steps)), torch.tensor(0.0)])


def model(sampling: Any, scale: float, shift: float) -> Any:
    objects = {"model_sampling": sampling, "process_latent_in": lambda latent: (latent - shift) * scale}
    return SimpleNamespace(get_model_object=objects.__getitem__)


@pytest.fixture(autouse=True)
def comfy(monkeypatch: pytest.MonkeyPatch) -> None:
    places = dict.fromkeys(("get_torch_device", "unet_offload_device"), lambda: torch.device("cpu"))
    management = SimpleNamespace(free_memory=lambda size, device: None, module_size=lambda module: 1, **places)
    samplers = SimpleNamespace(calculate_sigmas=simple, KSampler=SimpleNamespace(SCHEDULERS=["simple"]))
    parts = {"model_management": management, "samplers": samplers}
    for name, part in {"comfy": SimpleNamespace(**parts), **{f"comfy.{name}": parts[name] for name in parts}}.items():
        monkeypatch.setitem(sys.modules, name, part)


def required(node: Any) -> dict[str, Any]:
    return {name: kind[0] for name, kind in node.INPUT_TYPES()["required"].items()}


def test_nodes_keep_to_the_conventions() -> None:
    assert len(nodes.NODE_CLASS_MAPPINGS) == 3 and {*nodes.NODE_CLASS_MAPPINGS} == {*nodes.NODE_DISPLAY_NAME_MAPPINGS}
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        inspect.signature(getattr(node(), node.FUNCTION)).bind(**required(node))
        assert node.CATEGORY == "latentreward" and len(node.RETURN_TYPES) == len(node.RETURN_NAMES)


def test_the_workflow_fits_the_nodes() -> None:
    known = {name: (given.split(), dict.fromkeys(taken.split())) for name, (given, taken) in CORE.items()}
    known |= {name: (node.RETURN_TYPES, required(node)) for name, node in nodes.NODE_CLASS_MAPPINGS.items()}
    flow = json.loads((FOLDER / "workflow.json").read_text())
    for node in flow.values():
        takes = known[node["class_type"]][1]
        assert node["inputs"].keys() == takes.keys()
        for name, link in node["inputs"].items():
            if isinstance(link, list):
                assert takes[name] in (None, known[flow[link[0]]["class_type"]][0][link[1]])
    keep = next(node["inputs"] for node in flow.values() if node["class_type"] == "LatentRewardKeepBest")
    first, alike = flow[keep["latent"][0]]["inputs"], ("model", "steps", "scheduler")
    assert first["end_at_step"] == keep["step"] and [first[name] for name in alike] == [keep[name] for name in alike]


@pytest.mark.parametrize("process", [VP, FLOW])
@pytest.mark.parametrize("sampling", [EPS, CONST])
@pytest.mark.parametrize("timestep", [20, 500, 950])
def test_latents_become_states_of_the_rewards_process(process: Any, sampling: Any, timestep: int) -> None:
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(timestep))
    a, s = VP.alphas_cumprod[timestep].sqrt(), (1 - VP.alphas_cumprod[timestep]).sqrt()
    sigma = s / (a + s) if sampling is CONST else s / a
    latents = sampling.inverse_noise_scaling(sigma, sampling.noise_scaling(sigma, noise, clean))
    (states, at), vp = nodes.convert(latents, sampling, sigma, process), process is VP
    torch.testing.assert_close(at, torch.tensor([float(timestep)]) if vp else 1000 * (s / (a + s))[None])
    wanted = VP.add_noise(clean, noise, at.expand(3)) if vp else (a * clean + s * noise) / (a + s)
    torch.testing.assert_close(states, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=["sd15", "sd35"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, base, flow = tmp_path_factory.mktemp("stored"), source_of(request.param), request.param == "sd35"
    MODULES["dina" if flow else "lrm"](request.param).model.save_pretrained(folder, base=base)
    found = model(CONST, 1.5305, 0.0609) if flow else model(EPS, 0.18215, 0)
    (reward,) = nodes.LatentRewardLoad().load(str(folder), base, "float32")
    samples = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latent = {"samples": samples, "noise_mask": torch.arange(2.0).view(2, 1, 1, 1), "batch_index": [5, 6, 7, 9]}
    return {"reward": reward, "model": found, "latent": latent, "prompt": "a red circle", "scheduler": "simple"}


@pytest.mark.parametrize("step", [2, 5])
def test_the_best_are_kept_with_all_that_belongs_to_them(inputs: dict[str, Any], step: int) -> None:
    reward, found, latent, prompt, _ = inputs.values()
    scaled, sampling = (found.get_model_object(name) for name in ("process_latent_in", "model_sampling"))
    wanted = reward.score_latents(prompt, scaled(latent["samples"]))
    if step < 5:
        sigma, process = simple(sampling, "", 5)[step], reward.backbone.noise_process
        states, at = nodes.convert(scaled(latent["samples"]), sampling, sigma, process)
        wanted = reward.score_states(prompt, states[:, None], at)[:, 0]
    kept, text = nodes.LatentRewardKeepBest().choose(keep=3, steps=5, step=step, **inputs)
    best = wanted.argsort(descending=True)[:3].tolist()
    assert torch.equal(kept["samples"], latent["samples"][best]) and text.count(" kept") == 3
    assert kept["batch_index"] == [[5, 6, 7, 9][row] for row in best]
    assert kept["noise_mask"].flatten().tolist() == [row % 2 for row in best]
    assert nodes.LatentRewardScore().score(steps=5, step=step, **inputs)[1] == pytest.approx(wanted.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"keep": 5}, r"keep=5.* 4 latents"),
        ({"step": 0}, r"step is 0"),
        ({"latent": {"samples": torch.zeros(4, 16, 8, 8)}}, "latent: 16 channels.*4 channels"),
        ({"model": model(EPS, 0.13025, 0)}, r"model: .*; load one"),
    ],
)
def test_what_does_not_fit_is_refused(inputs: dict[str, Any], changed: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        nodes.LatentRewardKeepBest().choose(**{**inputs, "steps": 5, "step": 2, "keep": 1, **changed})
