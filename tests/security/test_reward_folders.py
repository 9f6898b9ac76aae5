"""No code runs from a checkpoint, run, model folder or published layout of a reward, whichever door it comes by."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch.distributed import checkpoint as distributed_checkpoint

from latentreward.alignment import LatentReward
from latentreward.apps.cli import main
from latentreward.core.checkpoints.shards import INDEX, REST
from latentreward.core.errors import InputError
from latentreward.reward import RewardModel, RewardModelScorer
from tests.formats.conftest import COMMITTED
from tests.marks import slow_after
from tests.tiny_pipelines import pipeline_folder

SECRET = "hunter2"
Change = Callable[[Path, Path], Any]


@dataclass(frozen=True)
class Payload:
    """Pickles as a call of ``os.system``."""

    canary: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File that only a payload makes; modules that make it lie in the current folder, which Python looks through."""
    path = tmp_path / "canary"
    here = tmp_path / "here"
    here.mkdir()
    (here / "evil_module.py").write_text(f"open({str(path)!r}, 'w')\nHead = Backbone = lambda *a, **k: None\n")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [*sys.path, str(here)])
    monkeypatch.setenv("SECRET", SECRET)
    monkeypatch.delitem(sys.modules, "evil_module", raising=False)
    return path


def call(target: str, canary: Path) -> dict[str, Any]:
    """A class with settings, as YAML names it, that makes the canary."""
    code = f"open({str(canary)!r}, 'w')"
    settings: dict[str, dict[str, Any]] = {
        "os.system": {"command": f"touch {canary}"},
        "subprocess.Popen": {"args": ["touch", str(canary)]},
        "builtins.exec": {"source": code},
        "builtins.open": {"file": str(canary), "mode": "w"},
        "importlib.import_module": {"name": "evil_module"},
        "torch.load": {"f": str(canary), "weights_only": False},
    }
    return {"class_path": target, "init_args": settings.get(target, {})}


TARGETS = (
    *("os.system", "subprocess.Popen", "builtins.exec", "builtins.open", "importlib.import_module", "torch.load"),
    *("evil_module.Head", "latentreward.evil_module.Head", "latentreward.reward.heads.evil_module.Head"),
    *("latentreward.reward.scoring.recipe.import_module", "__main__.os.system"),
)
"""What a configuration may name that is no class of a reward."""


def of_yaml(change: Callable[[dict[str, Any], Path], Any]) -> Change:
    """Change the settings of a run."""

    def apply(folder: Path, canary: Path) -> None:
        path = folder / "config.yaml"
        settings = yaml.safe_load(path.read_text())
        change(settings, canary)
        path.write_text(yaml.safe_dump(settings))

    return apply


def of_json(name: str, change: Callable[[dict[str, Any], Path], Any]) -> Change:
    """Change a JSON file of a folder."""

    def apply(folder: Path, canary: Path) -> None:
        config = json.loads((folder / name).read_text())
        change(config, canary)
        (folder / name).write_text(json.dumps(config))

    return apply


def part(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return settings["model"]["init_args"][name]


def of_part(kind: str, change: Callable[[dict[str, Any], Path], Any]) -> Change:
    """Change the settings of a run's ``backbone`` or ``head``."""
    return of_yaml(lambda settings, canary: change(part(settings, kind)["init_args"], canary))


def other_part(kind: str, target: str) -> Change:
    """Another class for the ``backbone`` or ``head`` of a run."""
    return of_yaml(lambda settings, canary: settings["model"]["init_args"].update({kind: call(target, canary)}))


def of_config(*keys: str, change: Callable[[dict[str, Any], Path], Any]) -> tuple[str, Change]:
    """Change an entry of a model folder's ``config.json``."""

    def apply(config: dict[str, Any], canary: Path) -> None:
        for key in keys:
            config = config[key]
        change(config, canary)

    return "model", of_json("config.json", apply)


def text(name: str, content: str) -> Change:
    return lambda folder, canary: (folder / name).write_text(content.replace("CANARY", str(canary)))


def pickled(name: str, wrap: Callable[[Payload], Any] = lambda payload: payload, how: str = "zip") -> Change:
    """Write a pickle with a payload in it."""

    def apply(folder: Path, canary: Path) -> None:
        content = wrap(Payload(canary))
        (folder / name).unlink(missing_ok=True)
        if how == "pickle":
            (folder / name).write_bytes(pickle.dumps(content))
        else:
            torch.save(content, folder / name, _use_new_zipfile_serialization=how == "zip")

    return apply


def in_checkpoint(change: Callable[[dict[str, Any], Payload], Any]) -> Change:
    """Put a payload into a sound checkpoint."""

    def apply(folder: Path, canary: Path) -> None:
        content = torch.load(folder / "reward.ckpt", weights_only=True)
        change(content, Payload(canary))
        torch.save(content, folder / "reward.ckpt")

    return apply


def sharded(file: str) -> Change:
    """A checkpoint in shards of which one file is a pickle with a payload."""

    def apply(folder: Path, canary: Path) -> None:
        content = torch.load(folder / "reward.ckpt", weights_only=True)
        (folder / "reward.ckpt").unlink()
        state = {"state_dict": content.pop("state_dict")}
        distributed_checkpoint.save(state, checkpoint_id=folder / "reward.ckpt", no_dist=True)
        torch.save(content, folder / "reward.ckpt" / REST)
        (folder / "reward.ckpt" / file).write_bytes(pickle.dumps(Payload(canary)))

    return apply


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)) + "model: *a59\n"
"""YAML of 60 lines that stands for 2**60 values."""

DOUBLING = (
    "a0: xx\n"
    + "".join(f"a{n}: ${{a{n - 1}}}${{a{n - 1}}}\n" for n in range(1, 60))
    + ("model: {class_path: x, init_args: {backbone: '${a59}', head: '${a59}'}}\n")
)
"""YAML of 61 lines whose interpolations stand for 2**60 characters."""

RUNS: dict[str, Change] = {
    **{f"{kind} {target}": other_part(kind, target) for kind in ("head", "backbone") for target in TARGETS},
    "head by its path": of_yaml(lambda s, c: s["model"]["init_args"].update(head="evil_module.Head")),
    "backbone by its path": of_yaml(lambda s, c: s["model"]["init_args"].update(backbone="evil_module.Backbone")),
    "a list for a head": of_yaml(lambda s, c: s["model"]["init_args"].update(head=[call("os.system", c)])),
    "head's width": of_part("head", lambda s, c: s.update(width=call("os.system", c))),
    "head's grid": of_part("head", lambda s, c: s.update(grid=call("os.system", c))),
    "head's spec": of_part("head", lambda s, c: s.update(spec=call("os.system", c))),
    "lora": of_part("backbone", lambda s, c: s.update(lora=call("os.system", c))),
    "lora's rank": of_part("backbone", lambda s, c: s.update(lora={"rank": call("os.system", c)})),
    "taps": of_part("backbone", lambda s, c: s.update(visual_taps=[call("os.system", c)])),
    "source": of_part("backbone", lambda s, c: s.update(source=call("os.system", c))),
    "yaml tag": text("config.yaml", "model: !!python/object/apply:os.system ['touch CANARY']\n"),
    "yaml tag of a name": text("config.yaml", "model: !!python/name:evil_module.Head\n"),
    "yaml tag of a module": text("config.yaml", "model: !!python/module:evil_module\n"),
    "yaml aliases that grow": text("config.yaml", BOMB),
    "interpolations that double": text("config.yaml", DOUBLING),
    "a pickle": pickled("reward.ckpt"),
    "a legacy pickle": pickled("reward.ckpt", how="legacy"),
    "a plain pickle": pickled("reward.ckpt", how="pickle"),
    "a weight": in_checkpoint(lambda content, payload: content["state_dict"].update({"model.head.x": payload})),
    "a key": in_checkpoint(lambda content, payload: content["state_dict"].update({payload: torch.zeros(1)})),
    "callbacks": in_checkpoint(lambda content, payload: content.update(callbacks={"TrainableEMA": payload})),
    "hyper-parameters": in_checkpoint(lambda content, payload: content.update(hyper_parameters=payload)),
    "the record of the base": in_checkpoint(lambda content, payload: content.update(base=payload)),
    "index of shards": sharded(INDEX),
    "rest of shards": sharded(REST),
    "safetensors by another name": lambda folder, canary: shutil.copyfile(
        next(Path(pipeline_folder("sd35")).rglob("*.safetensors")), folder / "reward.ckpt"
    ),
}
"""Runs that must be refused."""

UNREAD: dict[str, Change] = {
    "loss": of_yaml(lambda s, c: s["model"]["init_args"].update(loss=call("os.system", c))),
    "levels": of_yaml(lambda s, c: s["model"]["init_args"].update(levels=call("evil_module.Head", c))),
    "metrics": of_yaml(lambda s, c: s["model"]["init_args"].update(metrics=[call("os.system", c)])),
    "optimizer": of_yaml(lambda s, c: s["model"]["init_args"].update(optimizer=call("os.system", c))),
    "module": of_yaml(lambda s, c: s["model"].update(class_path="evil_module.Head")),
    "data": of_yaml(lambda s, c: s.update(data=call("os.system", c))),
    "trainer": of_yaml(
        lambda s, c: s.update(trainer={"callbacks": [call("os.system", c)], "logger": call("os.popen", c)})
    ),
    "modules beside it": text("latentreward.py", "open('CANARY', 'w')\n"),
    "a start-up file": text("sitecustomize.py", "open('CANARY', 'w')\n"),
}
"""Runs that load, as nothing reads the part that is malicious."""

MODELS: dict[str, tuple[str, Change]] = {
    **{
        f"{kind} {target}": of_config(kind, change=lambda s, c, target=target: s.update({"class": target}))
        for kind in ("head", "backbone")
        for target in TARGETS
    },
    "image sizes": of_config(change=lambda s, c: s.update(image_sizes={"class": "os.system"})),
    "head's width": of_config("head", "init_args", change=lambda s, c: s.update(width=call("os.system", c))),
    "lora": of_config("backbone", "init_args", change=lambda s, c: s.update(lora=call("os.system", c))),
    "head.safetensors": ("model", pickled("head.safetensors")),
    "base.safetensors": ("model", pickled("base.safetensors", how="pickle")),
    "adapter": ("model", pickled("adapter/adapter_model.safetensors")),
    "megatron": (
        "model",
        of_json("adapter/adapter_config.json", lambda d, c: d.update(target_modules=[], megatron_core="evil_module")),
    ),
    "state_dict.pt": ("lrm", pickled("state_dict.pt")),
    "an entry of state_dict.pt": (
        "lrm",
        pickled("state_dict.pt", lambda p: {"visual_projection": p, "logit_scale": 1.0}),
    ),
    "legacy state_dict.pt": ("lrm", pickled("state_dict.pt", how="legacy")),
    "plain state_dict.pt": ("lrm", pickled("state_dict.pt", how="pickle")),
    "rm_head.pt": ("dina", pickled("checkpoint/rm_head.pt")),
    "plain rm_head.pt": ("dina", pickled("checkpoint/rm_head.pt", how="pickle")),
    "adapter of DiNa-LRM": ("dina", pickled("checkpoint/backbone_lora/adapter_model.safetensors")),
}
"""Folders of published models that must be refused."""


def without(pattern: str, then: Change) -> Change:
    """Take safetensors away, so that a loader might fall back to what lies beside them."""

    def apply(folder: Path, canary: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()
        then(folder, canary)

    return apply


MODELS |= {
    "pickled adapter": ("model", without("adapter/*.safetensors", pickled("adapter/adapter_model.bin"))),
    "pickled U-Net": ("lrm", without("unet/*.safetensors", pickled("unet/diffusion_pytorch_model.bin"))),
    "pickled text encoder": ("lrm", without("text_encoder/*.safetensors", pickled("text_encoder/pytorch_model.bin"))),
}

BASES: dict[str, Change] = {
    "pickled transformer": without("transformer/*.safetensors", pickled("transformer/diffusion_pytorch_model.bin")),
    "pickled VAE": without("vae/*.safetensors", pickled("vae/diffusion_pytorch_model.bin")),
    "pickled text encoder": without("text_encoder/*.safetensors", pickled("text_encoder/pytorch_model.bin")),
    "classes in its index": of_json(
        "model_index.json", lambda d, c: d.update({name: ["evil_module", "Head"] for name in d if name[0] != "_"})
    ),
    "code of a text encoder": of_json(
        "text_encoder/config.json", lambda d, c: d.update(auto_map={"AutoModel": "evil_module.Head"})
    ),
    "code of a tokenizer": of_json(
        "tokenizer/tokenizer_config.json",
        lambda d, c: d.update(auto_map={"AutoTokenizer": ["evil_module.Head", None]}, tokenizer_class="Head"),
    ),
    "class of a transformer": of_json("transformer/config.json", lambda d, c: d.update(_class_name="evil_module.Head")),
}
"""Pipelines that a run names as its base: refused, or loaded by the classes that we know."""

INTERPOLATIONS = (
    *("${oc.env:SECRET}", "a${oc.env:SECRET,x}b", "${oc.decode:${oc.env:SECRET}}", "${oc.create:{a: 1}}"),
    *("\\${oc.env:SECRET}", "\\\\${oc.env:SECRET}", "${elsewhere}", "a/${elsewhere}", "${setting:fit.elsewhere}"),
    *("${oc.select:elsewhere}", "${oc.${kind}:SECRET}", "$${oc.env:SECRET}"),
)


def load(path: Path) -> None:
    RewardModel.from_pretrained(path)


def as_reward(path: Path) -> None:
    LatentReward(str(path)).latent_space()
    LatentReward(str(path)).stored.load(RewardModel)


def as_scorer(path: Path) -> None:
    RewardModelScorer(str(path), device="cpu").prepare()


DOORS = (load, as_reward, as_scorer)


def refusals(path: Path, canary: Path) -> list[str]:
    """Messages of all doors; each refuses in one line or loads cleanly, and nothing of ``path`` runs."""
    messages = []
    for door in DOORS:
        try:
            door(path)
        except InputError as error:
            messages.append(str(error))
        assert not canary.exists(), door
        assert "evil_module" not in sys.modules, door
    assert not any("\n" in message or SECRET in message for message in messages)
    return messages


def spoilt(folder: Path, change: Change, canary: Path) -> Path:
    copy = shutil.copytree(folder, canary.with_name("spoilt"))
    change(copy, canary)
    return copy


ALWAYS = (
    "head evil_module.Head",
    "a pickle",
    "index of shards",
    "yaml aliases that grow",
    "interpolations that double",
)


@pytest.mark.parametrize("name", slow_after(len(ALWAYS), dict.fromkeys([*ALWAYS, *RUNS])))
def test_runs_are_refused(name: str, good: Path, canary: Path) -> None:
    messages = refusals(spoilt(good / "run", RUNS[name], canary), canary)
    assert len(messages) == len(DOORS)
    if name.startswith(("head ", "backbone ")):
        assert all("trust_remote_code" in message for message in messages)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after(2, list(UNREAD)))
def test_what_no_reward_reads_is_not_run(name: str, good: Path, canary: Path) -> None:
    assert refusals(spoilt(good / "run", UNREAD[name], canary), canary) == []


@pytest.mark.parametrize(
    "name", slow_after(3, dict.fromkeys(["head evil_module.Head", "head.safetensors", "adapter", *MODELS]))
)
def test_models_are_refused(name: str, good: Path, canary: Path) -> None:
    layout, change = MODELS[name]
    assert len(refusals(spoilt(good / layout, change, canary), canary)) == len(DOORS)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after(3, list(BASES)))
def test_bases_run_nothing(name: str, good: Path, canary: Path) -> None:
    base = spoilt(Path(pipeline_folder("sd35")), BASES[name], canary)
    run = shutil.copytree(good / "run", canary.with_name("run"))
    of_yaml(lambda s, c: part(s, "backbone")["init_args"].update(source=str(base)))(run, canary)
    refusals(run, canary)


@pytest.mark.parametrize("value", INTERPOLATIONS)
@pytest.mark.parametrize("where", ["source", "lora", "class", "head"])
def test_nothing_is_resolved(value: str, where: str, good: Path, canary: Path) -> None:
    def change(settings: dict[str, Any], _: Path) -> None:
        settings |= {"elsewhere": "${oc.env:SECRET}", "kind": "env"}
        if where == "source":
            part(settings, "backbone")["init_args"]["source"] = value
        elif where == "lora":
            part(settings, "backbone")["init_args"]["lora"] = {"target_modules": [value]}
        elif where == "class":
            part(settings, "head")["class_path"] = value
        else:
            settings["model"]["init_args"]["head"] = value

    messages = refusals(spoilt(good / "run", of_yaml(change), canary), canary)
    assert len(messages) == len(DOORS)
    assert all("would be resolved" in message or "like a secret" in message for message in messages)


@pytest.mark.parametrize("door", ["score", "publish", "benchmark", "serve", "fit", "generate", "evaluate-policy"])
@pytest.mark.parametrize("kind", slow_after(1, ["run", "model"]))
def test_every_command_refuses_and_names_the_option(
    door: str, kind: str, good: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = RUNS["head evil_module.Head"] if kind == "run" else MODELS["head evil_module.Head"][1]
    path = spoilt(good / kind, change, canary)
    prompts = canary.with_name("prompts.txt")
    prompts.write_text("a cat\n")
    Image.new("RGB", (16, 16)).save("picture.png")
    reward = json.dumps({"class_path": "LatentReward", "init_args": {"path": str(path)}})
    scorer = json.dumps([{"class_path": "RewardModelScorer", "init_args": {"path": str(path), "device": "cpu"}}])
    configs = ("align/lpo_sd35_tiny.yaml", "trainer/cpu.yaml")
    generate = [str(prompts), "out", "--policy.source=sd35_tiny", "--best_of=2", "--device=cpu"]
    arguments = {
        "score": ["*.png", "s.csv", f"--model={path}", "--prompt=a", "--device=cpu"],
        "publish": [str(path), "out", "--device=cpu"],
        "benchmark": ["out", f"--data={COMMITTED / 'imagereward'}", f"--model={path}", "--limit=1", "--levels=[]"],
        "serve": [str(path), "--port=0", "--device=cpu"],
        "fit": [*(f"--config=configs/{name}" for name in configs), f"--model.reward={reward}"],
        "generate": [*generate, f"--reward={reward}"],
        "evaluate-policy": ["out", "--policy.pipeline=sd_tiny", f"--prompts={prompts}", f"--scorers={scorer}"],
    }
    with pytest.raises(SystemExit) as caught:
        main([door, *arguments[door]])
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "evil_module.Head" in error and "--trust_remote_code=true" in error
    assert not canary.exists()
    assert "evil_module" not in sys.modules


@pytest.mark.slow
def test_what_libraries_look_for_is_not_found_beside_a_model(good: Path, tmp_path: Path) -> None:
    """They try to import dozens of packages that are not installed, and the user may stand in the model's folder."""
    folder = shutil.copytree(good / "run", tmp_path / "run")
    program = "import sys; from latentreward.apps.cli import main; main(sys.argv[1:])"
    Image.new("RGB", (16, 16)).save(folder / "picture.png")
    for name in ("brotli", "scipy", "opt_einsum", "cloudpickle", "torchvision", "xformers", "sentencepiece"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    arguments = ["score", "picture.png", "scores.csv", "--model=.", "--prompt=a cat", "--device=cpu"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert not (tmp_path / "canary").exists()
    assert done.returncode == 0, done.stderr
    assert (folder / "scores.csv").exists()
