"""Which family a pipeline is of, and which pipelines are refused before a weight is read."""

from pathlib import Path
from typing import Any

import diffusers
import pytest

from latentreward.alignment import PolicySource
from latentreward.alignment.policies.checkpoint import SOURCE, read_policy_adapter
from latentreward.core.errors import InputError
from latentreward.diffusion import find_family, import_family
from latentreward.diffusion.families.base import OTHER_TASKS, families
from latentreward.diffusion.families.sd import StableDiffusion
from tests.diffusion.families.made_configs import MadeConfigs
from tests.diffusion.families.twins import TWINS, Twin
from tests.tiny_pipelines import pipeline_folder

VAE = {"latent_channels": 16, "block_out_channels": [1] * 4, "scaling_factor": 0.3611, "shift_factor": 0.1159}


class OwnFamily(StableDiffusion):
    """A family outside the package."""

    name = "own"


@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS.keys())
def test_twins_are_recognised_by_their_configs(twin: Twin) -> None:
    assert twin.source().resolve_family().name == twin.family


def test_unknown_families_are_refused_with_those_known() -> None:
    unknown = MadeConfigs({"transformer": {"_class_name": "SomethingElse"}, "vae": VAE})
    with pytest.raises(InputError, match="is of no known family") as refused:
        find_family(unknown)
    assert all(kind.title in str(refused.value) for kind in families().values())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "index", ["FluxFillPipeline", "QwenImageLayeredPipeline", "ZImageOmniPipeline", "WanVACEPipeline", "Flux2Pipeline"]
)
def test_pipelines_for_other_tasks_are_refused(index: str) -> None:
    parts = {"transformer": {"_class_name": "FluxTransformer2DModel"}, "vae": VAE}
    with pytest.raises(InputError, match=f"is a {index}, which takes more than a prompt"):
        find_family(MadeConfigs(parts, _class_name=index))


@pytest.mark.slow
def test_each_pipeline_of_diffusers_with_a_known_network_is_refused_or_taken() -> None:
    taken = {"FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "ZImagePipeline", "ZImageImg2ImgPipeline",
             "ZImageInpaintPipeline", "QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline",
             "Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "WanPipeline", "WanVideoToVideoPipeline",
             "Lumina2Pipeline", "ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline",
             "ErnieImagePipeline", "Ideogram4Pipeline", "Krea2Pipeline", "FluxKontextPipeline",
             "QwenImageEditPipeline", "QwenImageEditPlusPipeline", "HiDreamImagePipeline"}  # fmt: skip
    flows = [kind for kind in families().values() if kind.flow and kind.name != "sd3"]
    networks = tuple(kind.network_class for kind in flows)
    pipelines = (name for name in dir(diffusers) if name.endswith("Pipeline"))
    found = {name for name in pipelines if takes(getattr(diffusers, name), networks)}
    assert found >= taken
    assert {name for name in found if OTHER_TASKS.search(name)} == found - taken


def takes(pipeline: Any, networks: tuple[str, ...]) -> bool:
    """Tell whether a pipeline's ``transformer`` is one of these classes; those that lack a library are no classes."""
    named = str(getattr(pipeline.__init__, "__annotations__", {}).get("transformer", ""))
    return any(network in named for network in networks)


def test_a_family_of_ones_own_by_its_import_path() -> None:
    path = f"{__name__}.OwnFamily"
    assert import_family(path) is OwnFamily
    source = PolicySource(pipeline_folder("sd15"), family=path)
    assert type(source.resolve_family()) is OwnFamily
    for wrong, reason in (("nowhere.Family", "cannot be imported"), ("Family", "cannot be imported"),
                          ("sdxl", "is no path of a class, .* for a family of this package leave family out"),
                          (f"{__name__}.Path", "not a subclass"),
                          ("latentreward.diffusion.FlowFamily", "lacks .*velocity of .*Family; define"),
                          (".flow.FlowFamily", "is relative; give the whole path")):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            import_family(wrong)


def test_a_strangers_checkpoint_does_not_import_its_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from latentreward.alignment import POLICY

    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    record = {"source": "sd_tiny", "lora": {"rank": 2}, "family": "stranger.Family"}
    state = {f"policy.network.layer.lora_A.{POLICY}.weight": torch.zeros(2, 2)}
    torch.save({"state_dict": state, SOURCE: record}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"names the family 'stranger.Family', which would be imported"):
        read_policy_adapter(tmp_path / "last.ckpt")
    assert read_policy_adapter(tmp_path / "last.ckpt", trusted=True).source.family == "stranger.Family"
    torch.save({"state_dict": state, SOURCE: {**record, "family": ["stranger.Family"]}}, tmp_path / "last.ckpt")
    for trusted in (False, True):
        with pytest.raises(InputError, match=r"names the family \['stranger.Family'\], which would be imported"):
            read_policy_adapter(tmp_path / "last.ckpt", trusted)
