"""``latentreward configs``: list or print the YAML files that come with the package, or compose a run of several."""

import re
from functools import partial
from itertools import groupby, takewhile
from pathlib import PurePosixPath
from typing import Any

import yaml
from omegaconf import OmegaConf

from latentreward.core.errors import InputError, did_you_mean
from latentreward.core.settings.functions import run_function
from latentreward.core.settings.rewriting import shipped_configs

LONGEST = 110
"""Most characters of a summary that is shown whole; a longer summary is cut at its first colon."""
FLOWS_ONLY, NOISE_POLICIES = ("awm", "crd", "dgpo", "nft"), ("ip2p_sd15", "sd15", "sd21", "sdxl")
"""Methods of configs/method for flows alone, and policies of configs/policy that predict noise."""


def configs(
    name: str | None = None, method: str | None = None, hardware: str | None = None, compose: bool = False
) -> None:
    """List the YAML files that come with the package, by kind, print one, or compose an alignment of several.

    Any command accepts a listed file as ``--config configs/NAME``, from any working directory. The list shows the
    environment variables that a file needs in brackets. ``--compose flux1 nft one_gpu`` prints the run of a policy, a
    method and some hardware as one file.

    Args:
        name: File to print, e.g. model/lrm_sd15.yaml, or folder to list, e.g. model; all files are listed by default.
            With compose a policy, e.g. flux1: a file of configs/policy.
        method: With compose, a file of configs/method, e.g. nft.
        hardware: With compose, a file of configs/trainer, e.g. one_gpu; by default that of the policy's file.
        compose: Whether to print the run of a policy and a method.
    """
    if compose:
        print(composed(name, method, hardware), end="")
        return
    for setting, given in {"method": method, "hardware": hardware}.items():
        if given is not None:
            raise InputError(f"{setting}: {given!r:.200} is for --compose; add it, or give one name")
    shipped = shipped_configs()
    wanted = "" if name is None else name.removeprefix("configs/").strip("/")
    if wanted in shipped:
        print(shipped[wanted].read_text(encoding="utf-8"), end="")
        return
    files = sorted((PurePosixPath(one) for one in shipped), key=lambda file: (file.parent, file.name))
    chosen = [file for file in files if wanted in ("", *map(str, file.parents))]
    if not chosen:
        raise InputError(
            f"name: no shipped file {name!r}{did_you_mean(wanted, [*shipped, *{str(f.parent) for f in files}])}"
        )
    width = max(len(file.name) for file in chosen)
    for kind, group in groupby(chosen, lambda file: file.parent):
        print(f"{kind}/")
        for file in group:
            print(f"  {file.name:{width}}  {summary(shipped[str(file)].read_text(encoding='utf-8'))}")


def composed(policy: str | None, method: str | None, hardware: str | None) -> str:
    """Return one YAML text of the files of a policy, of hardware where given, and of a method; a later one counts.

    The method's file is last: it decides over guidance, clipping and logger.
    """
    shipped, texts = shipped_configs(), dict[str, str]()
    given = {"policy": ("policy", policy), "hardware": ("trainer", hardware), "method": ("method", method)}
    for setting, (folder, name) in given.items():
        file = f"{folder}/{name}.yaml"
        if file in shipped:
            texts[file] = shipped[file].read_text(encoding="utf-8")
        elif name is not None or setting != "hardware":
            problem = "--compose takes a policy and a method" if name is None else f"no file {name!r:.200}"
            known = [PurePosixPath(one).stem for one in shipped if one.startswith(f"{folder}/")]
            raise InputError(f"{setting}: {problem} of configs/{folder}{did_you_mean(name or '', known)}")
    if method in FLOWS_ONLY and policy in NOISE_POLICIES:
        raise InputError(f"method: {method} is for flows, and {policy} predicts noise; give ram, lpo or another")
    parts = [yaml.safe_load(text) for text in texts.values()]
    run: dict[str, Any] = OmegaConf.to_container(OmegaConf.merge(*parts))  # type: ignore[assignment]
    callbacks = [one for part in parts for one in part["trainer"].get("callbacks", [])]
    last = {one["class_path"]: one for one in callbacks}
    kept = [one for index, one in enumerate(callbacks) if one in last.values() and one not in callbacks[:index]]
    run = {key: run[key] for key in ("model", "data")} | {"trainer": run["trainer"] | {"callbacks": kept}}
    names = " ".join(name for name in (policy, method, hardware) if name)
    head = [
        "An alignment, for example as run.yaml:",
        "",
        f"  export {' '.join(f'{name}=…' for name in variables(''.join(texts.values())))}",
        f"  latentreward configs --compose {names} > run.yaml",
        "  latentreward fit --config run.yaml --estimate   # memory and computation; without it, the run",
        "",
        f"Without the file: fit {' '.join(f'--config configs/{file}' for file in texts)}",
    ]
    for text in texts.values():
        head += ["", *head_comment(text)]
    dumped = yaml.safe_dump(run, sort_keys=False, default_flow_style=None, allow_unicode=True, width=118)
    return "".join(f"# {line}".rstrip() + "\n" for line in head) + dumped


def head_comment(text: str) -> list[str]:
    """Return the lines of a file's head comment."""
    return [
        line.removeprefix("#").removeprefix(" ") for line in takewhile(lambda line: line[:1] == "#", text.splitlines())
    ]


def variables(text: str) -> list[str]:
    """Return the environment variables that a file needs."""
    return list(dict.fromkeys(re.findall(r"\$\{oc\.env:(\w+)\}", text)))


def summary(text: str) -> str:
    """Return the first sentence of a file's head comment, without sources in parentheses, and variables it needs."""
    comment = re.sub(r"\s\([^()]*[A-Za-z]{2}[^()]*\)", "", "\n".join(head_comment(text)))
    sentence = " ".join(re.split(r"[.;](?:\s|$)|:(?:\n|$)", comment, maxsplit=1)[0].split())
    sentence = sentence if len(sentence) <= LONGEST else sentence.partition(": ")[0]
    needed = ", ".join(variables(text))
    return sentence + (f" [{needed}]" if needed else "")


run = partial(run_function, configs, bare=3, classes=False)
