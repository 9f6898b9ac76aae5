"""Writes hpsv2_open_clip.safetensors into the current folder; README.md says how it is run."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types

import torch
from safetensors.torch import save_file

TEXT = {"context_length": 77, "vocab_size": 516, "width": 32, "heads": 16, "layers": 2}
VISION = {"image_size": 28, "layers": 2, "width": 32, "head_width": 2, "patch_size": 14}
START, END = 514, 515


class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyAttribute(name, (), {})


class NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty torchvision."""

    def find_spec(self, name, path, target=None):
        found = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if found else None

    def create_module(self, spec):
        module = _StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module) -> None:
        pass


def main() -> None:
    """Make the model and write what it computes."""
    sys.meta_path.insert(0, NoTorchvision())
    package = importlib.import_module("open_clip")
    torch.manual_seed(0)
    model = package.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT, output_dict=True).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    pixels, ids = torch.randn(3, 3, 28, 28), torch.zeros(3, 77, dtype=torch.int64)
    for row, length in enumerate((3, 10, 75)):
        ids[row, : length + 2] = torch.tensor([START, *torch.randint(1, START, (length,)).tolist(), END])
    with torch.no_grad():
        output = model(pixels, ids)
    seen, said = output["image_features"], output["text_features"]
    tensors = {f"state_dict.{name}": value.detach().clone() for name, value in model.state_dict().items()}
    tensors |= {"pixels": pixels, "ids": ids, "image_features": seen, "text_features": said}
    tensors["score"] = torch.diagonal(seen @ said.T).clone()
    save_file(tensors, "hpsv2_open_clip.safetensors", {"open_clip": package.__version__, "torch": torch.__version__})


if __name__ == "__main__":
    main()
