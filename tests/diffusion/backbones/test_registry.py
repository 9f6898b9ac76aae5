"""Names of backbones: what the registry knows, and what a plug-in may add."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

from latentreward.core import registry
from latentreward.core.errors import InputError
from latentreward.core.registry import backbone_names, register_backbone
from latentreward.diffusion import DiffusionBackbone, LoRA, sd_tiny


def test_every_name_is_a_typed_factory() -> None:
    ours = {name: path for name, path in backbone_names().items() if path.startswith("latentreward.")}
    assert "sd_tiny" in ours
    for name, path in ours.items():  # other tests may have registered some of their own
        module, function = path.rsplit(".", 1)
        factory = getattr(import_module(module), function)
        signature = inspect.signature(factory, eval_str=True)
        assert factory.__name__ == name
        assert issubclass(signature.return_annotation, DiffusionBackbone)
        assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


def test_a_factory_notes_how_it_was_called() -> None:
    """Positional arguments too, those of ``**options``, tuples and dataclasses; as JSON reads them."""
    backbone = sd_tiny(None, visual_taps=(1, 2), tuning="lora", lora=LoRA(rank=2))
    assert backbone.built_by.class_path == "latentreward.diffusion.families.sd.sd_tiny"
    assert backbone.built_by.init_args["source"] is None
    assert backbone.built_by.init_args["visual_taps"] == [1, 2]
    assert backbone.built_by.init_args["lora"]["rank"] == 2


def test_taken_name_is_refused() -> None:
    def sd15() -> None: ...

    with pytest.raises(InputError, match=r"backbone name 'sd15' is taken by latentreward.diffusion.families.sd.sd15"):
        register_backbone(sd15)


def test_reading_the_names_needs_no_network_library() -> None:
    """The command line suggests names before it pays for torch."""
    code = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('registry', sys.argv[1]);"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
        "assert module.backbone_names() and 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, registry.__file__], check=True)
