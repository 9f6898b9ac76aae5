"""Under ``--restrict-imports`` no setting runs a program or code from elsewhere: a canary file stays away."""

import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests.faults.forked import Outcome, outcomes
from tests.rewards.stored import write_run

ROOT = Path(__file__).resolve().parents[2]
FIT = ["fit", "--config=configs/model/lrm_tiny.yaml", "--config=configs/data/tinyworld_pickapic.yaml"]
FIT += ["--config=configs/trainer/cpu.yaml", "--trainer.max_steps=1"]
JUDGE = ["evaluate-policy", "out", "--prompts=prompts.txt", "--policy.images=pictures", "--device=cpu"]


def tool(*command: str, **options: str) -> dict:
    arguments = {"command": [*command, "{scores}"], "name": "tool", **options}
    return {"class_path": "latentreward.scorers.tools.CommandScorer", "init_args": arguments}


def called(function: str) -> dict:
    return {"class_path": "latentreward.scorers.CallableScorer", "init_args": {"function": function, "name": "x"}}


def class_of(path: str, /, **options: str) -> dict:
    return {"class_path": path, "init_args": options}


def setup(function: object) -> dict:
    return {"trainer": {"callbacks": [class_of("lightning.pytorch.callbacks.LambdaCallback", setup=function)]}}


class Payload:
    """Makes the file as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def run_with(head: dict, folder: Path) -> str:
    """A trained reward whose settings name another head."""
    write_run(folder, "lrm", "sd15")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["model"]["init_args"]["head"] = head
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return str(folder)


def malicious(folder: Path) -> dict[str, tuple[list[str], dict]]:
    """Name -> command line and the YAML that it reads; each would leave ``canary`` if it ran."""
    touch = f"touch {folder / 'canary'}"
    python = f"open({str(folder / 'canary')!r}, 'w')"
    script, link, hub = folder / "script", folder / "link", folder / "hub"
    script.write_text(f"#!/bin/sh\n{touch}\n")
    script.chmod(0o755)
    link.symlink_to("/bin/sh")
    hub.mkdir()
    (hub / "hubconf.py").write_text(f"{python}\ndef entry(*args, **options):\n    return None\n")
    (folder / "evil.py").write_text(f"{python}\nfrom torch import nn\nclass Head(nn.Module):\n    pass\n")
    (folder / "evil_scorer.py").write_text(f"{python}\ndef brightness(images, prompts):\n    return [0.0]\n")
    torch.save(Payload(folder / "canary"), folder / "evil.pt")
    unpickle = class_of("torch.serialization.load", f=str(folder / "evil.pt"), weights_only=False)
    scorers = {
        "shell": tool("sh", "-c", touch),
        "shell by path": tool("/bin/sh", "-c", touch),
        "env": tool("env", "sh", "-c", touch),
        "env by path": tool("/usr/bin/env", "touch", str(folder / "canary")),
        "python": tool("python3", "-c", python),
        "this python": tool(sys.executable, "-c", python),
        "own script": tool(str(script)),
        "relative script": tool("./script", folder=str(folder)),
        "relative up": tool(f"../{folder.name}/script"),
        "link to a shell": tool(str(link), "-c", touch),
        "dots": tool(f"{folder}/hub/../script"),
        "callable os.system": called("os.system"),
        "callable by a module's import": called("latentreward.scorers.tools.subprocess.run"),
        "own module": called("evil_scorer.brightness"),
    }
    hub_load = {
        "class_path": "torch.hub.load",
        "init_args": {"repo_or_dir": str(hub), "model": "entry", "source": "local"},
    }
    library = class_of(
        "torch.cuda.memory.CUDAPluggableAllocator", path_to_so_file="x.so", alloc_fn_name="a", free_fn_name="b"
    )
    untyped = {
        "strategy": class_of("lightning.pytorch.strategies.DDPStrategy", ddp_comm_state=library),
        "profiler": class_of("lightning.pytorch.profilers.PyTorchProfiler", table_kwargs={"x": [{"y": library}]}),
        "logger": class_of("lightning.pytorch.loggers.CSVLogger", save_dir=".", version=library),
        "callbacks": [class_of("lightning.pytorch.callbacks.RichProgressBar", console_kwargs={"x": library})],
        "plugins": [
            class_of("lightning.pytorch.plugins.MixedPrecision", precision="bf16-mixed", device="cpu", scaler=library)
        ],
    }
    loaders = {f"library in {name}": {"trainer": {name: value}} for name, value in untyped.items()}
    loaders["class as function"] = setup("torch.nn.ReLU")
    fits = {
        "hub as head": {"model": {"init_args": {"head": hub_load}}},
        "hub as backbone": {"model": {"init_args": {"backbone": hub_load}}},
        "hub as optimizer": {"model": {"init_args": {"optimizer": hub_load}}},
        "os.system as head": {"model": {"init_args": {"head": class_of("os.system", command=touch)}}},
        "os.system as logger": {"trainer": {"logger": class_of("os.system", command=touch)}},
        "own head": {"model": {"init_args": {"head": {"class_path": "evil.Head"}}}},
        "own callback": {"trainer": {"callbacks": [{"class_path": "evil.Head"}]}},
        "popen as callback": {"trainer": {"callbacks": [class_of("subprocess.Popen", args=touch)]}},
        "extension": {"model": {"init_args": {"loss": {"class_path": "torch.utils.cpp_extension.load"}}}},
        "unpickling as head": {"model": {"init_args": {"head": unpickle}}},
        "unpickling as optimizer": {"model": {"init_args": {"optimizer": unpickle}}},
        "unpickling as function": setup(unpickle),
        "exec as function": setup(class_of("torch.fx.graph_module._exec_with_source", src=python, globals={})),
        "own family": {"model": {"init_args": {"backbone": class_of("lumina2", source="sd_tiny", family="evil.Head")}}},
        "import as function": setup(class_of("latentreward.scoring.layouts.recipe.imported", path="evil.Head")),
        "function by its path": setup("torch.fx.graph_module._exec_with_source"),
        **loaders,
        "resolver": {"trainer": {"default_root_dir": f"${{os.system:{touch}}}"}},
        "tag": {"trainer": {"default_root_dir": "TAG"}},
    }
    trusted = ["score", "pictures", "scores.csv", "--trust_remote_code=true", "--device=cpu", "--prompt=a cat"]
    models = {
        "unpickling as a trained head": run_with(unpickle, folder / "unpickling"),
        "own trained head": run_with({"class_path": "evil.Head"}, folder / "own"),
    }
    cases = {name: ([*JUDGE, f"--config={name}.yaml"], {"scorers": [scorer]}) for name, scorer in scorers.items()}
    cases |= {name: ([*FIT, f"--config={name}.yaml"], settings) for name, settings in fits.items()}
    return cases | {name: ([*trusted, f"--config={name}.yaml"], {"model": model}) for name, model in models.items()}


def outcomes_in(folder: Path, cases: list[list[str]]) -> list[Outcome]:
    return [*outcomes([(case, folder) for case in cases], PATH=f"{folder}:{os.environ['PATH']}")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "cat.png")
    (tmp_path / "pictures" / "images.csv").write_text("file,prompt\ncat.png,a cat\n")
    return tmp_path


REFUSED_BY_TYPE = {
    "resolver": "Unsupported interpolation type os.system",
    "tag": "is not accepted",
    "library in logger": "expected int or str or null",
    "library in plugins": "does not correspond to a subclass of GradScaler",
}
"""Settings that are refused whatever may be imported, and by which words."""


@pytest.mark.slow
def test_no_setting_runs_a_program(folder: Path) -> None:
    cases = malicious(folder)
    for name, (_, settings) in cases.items():
        text = yaml.safe_dump(settings)
        if name == "tag":
            command = f"touch {folder / 'canary'}"
            text = text.replace("TAG", f"!!python/object/apply:os.system ['{command}']")
        (folder / f"{name}.yaml").write_text(text)
    results = outcomes_in(folder, [[*arguments, "--restrict-imports"] for arguments, _ in cases.values()])
    assert len(results) == len(cases) >= 25
    for name, result in zip(cases, results, strict=True):
        assert result.status == 2, (name, result)
        refusal = REFUSED_BY_TYPE.get(name)
        assert (refusal or "--restrict-imports does not ") in result.line, (name, result)
        assert refusal or "if you trust it" in result.line, (name, result)
    assert not (folder / "canary").exists()


@pytest.mark.slow
def test_programs_that_are_named_run(folder: Path) -> None:
    (folder / "script").write_text(f"#!/bin/sh\ntouch {folder / 'canary'}\n")
    (folder / "script").chmod(0o755)
    (folder / "link").symlink_to(folder / "script")
    (folder / "tool.yaml").write_text(yaml.safe_dump({"scorers": [tool(str(folder / "script"))]}))
    command = [*JUDGE, "--config=tool.yaml"]
    other, link, relative, alone, named = outcomes_in(
        folder,
        [
            [*command, "--restrict-imports", f"--allow-programs={os.path.realpath('/bin/true')}"],
            [*command, "--restrict-imports", f"--allow-programs={folder / 'link'}"],
            [*command, "--restrict-imports", "--allow-programs=script"],
            [*command, "--allow-programs=/bin/sh"],
            [*command, "--restrict-imports", f"--allow-programs={folder / 'script'}"],
        ],
    )
    assert f"if you trust it with everything that it can do, say --allow-programs={folder / 'script'}" in other.line
    assert f"is a link; give {folder / 'script'}" in link.line
    assert "--allow-programs: script is not the absolute path of a program" in relative.line
    assert "--allow-programs restricts nothing without --restrict-imports" in alone.line
    assert (folder / "canary").exists(), named
