"""A model folder that is damaged, half downloaded, newer, or names foreign classes is refused in one line."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentreward.core.errors import InputError
from latentreward.reward import CLIPProjectionHead, RewardModel
from tests.alignment.rewards.stored import write_run
from tests.marks import slow_after
from tests.reward.scoring.test_published import write_dina, write_lrm

pytestmark = pytest.mark.usefixtures("bases_here")

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
LORA = {"rank": 2, "alpha": 3.0}
TO_Q = "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight"


class ForeignHead(CLIPProjectionHead):
    """A head that latentreward does not export."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two model folders, one with an adapter, one trained as a whole."""
    folders = {}
    for kind, (method, name, options) in {
        "lora": ("dina", "sd35", {"lora": LORA}),
        "full": ("lrm", "sd15", {}),
    }.items():
        place = tmp_path_factory.mktemp(kind)
        write_run(place / "run", method, name, **options)
        RewardModel.from_pretrained(place / "run").save_pretrained(place / "model")
        folders[kind] = place / "model"
    return folders


@pytest.fixture
def copies(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """Copies of the folders; their checksums, which would speak first, are not compared."""
    monkeypatch.setattr("latentreward.reward.scoring.layouts.model_folder.check_hash", lambda path, *_: path)
    yield {kind: Path(shutil.copytree(folder, tmp_path / kind)) for kind, folder in models.items()}


def refused(folder: Path, message: str, **options: Any) -> str:
    with pytest.raises(InputError, match=message) as caught:
        RewardModel.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


FILES = {
    "lora": (
        "config.json",
        "head.safetensors",
        "base.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ),
    "full": ("config.json", "head.safetensors", "base.safetensors", "backbone.safetensors"),
}
EVERY_FILE = [(kind, name) for kind, names in FILES.items() for name in names]


@pytest.mark.parametrize(("kind", "name"), slow_after(1, EVERY_FILE))
def test_half_downloaded(kind: str, name: str, copies: dict[str, Path]) -> None:
    path = copies[kind] / name
    whole = path.read_bytes()
    path.unlink()
    assert refused(copies[kind], f"lacks {path.name}; download it again")
    path.write_text(POINTER)
    assert str(path) in refused(copies[kind], "is a git-lfs pointer, not the file; run `git lfs pull`")
    for length in (0, 1, 20, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        assert str(path) in refused(copies[kind], "download it again")
    path.write_bytes(b"\xff" * 100)
    assert str(path) in refused(copies[kind], "download it again")
    path.write_bytes(whole)
    RewardModel.from_pretrained(copies[kind])


@pytest.mark.parametrize(
    ("kind", "name", "tensor"),
    slow_after(
        1,
        [
            ("lora", "head.safetensors", "head.weight"),
            ("lora", "adapter/adapter_model.safetensors", TO_Q),
            ("full", "head.safetensors", "visual_projection.weight"),
            ("full", "backbone.safetensors", "unet.conv_in.weight"),
            ("full", "backbone.safetensors", "text_encoder.text_encoder.final_layer_norm.weight"),
        ],
    ),
)
def test_every_tensor_is_compared(kind: str, name: str, tensor: str, copies: dict[str, Path]) -> None:
    path = copies[kind] / name
    tensors = load_file(path)
    if tensor not in tensors:
        tensor = next(other for other in tensors if other.startswith("text_encoder."))
    shown = tensor.removeprefix("base_model.model.").replace(".", r"\.")
    cases: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
        (lambda t: t.pop(tensor), f"missing tensor {shown}"),
        (lambda t: t.update(surplus=torch.zeros(1)), "unexpected tensor surplus"),
        (lambda t: t.update({tensor: t[tensor][..., :1].clone()}), rf"tensor {shown} has shape \("),
    ]
    for change, message in cases:
        save_file(tensors, path)
        edit_tensors(path, change)
        assert str(path) in refused(copies[kind], message)


@pytest.mark.slow
def test_the_record_of_the_base_is_compared_too(copies: dict[str, Path]) -> None:
    path = copies["lora"] / "base.safetensors"
    name = next(name for name in load_file(path) if name.startswith("transformer."))
    edit_tensors(path, lambda t: t.update({name: t[name][:3].clone()}))
    refused(copies["lora"], "differs from that of")
    edit_tensors(path, lambda t: t.pop(name))
    refused(copies["lora"], rf"has another weight, {name}")
    edit_tensors(path, lambda t: t.update(surplus=torch.zeros(4)))
    refused(copies["lora"], "lacks surplus")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), "format_version is 2, but .* up to 1; update latentreward"),
        (lambda c: c.update(format_version="1"), "format_version is '1', no number from 1 on"),
        (lambda c: c.update(base=5), "base: .* not 5; download it again"),
        (lambda c: c.update(training=["a"]), r"training: .* not \['a'\]; download it again"),
        (lambda c: c.update(noise={"timesteps": [1.0] * 20_000}), "noise: levels times seeds are 20000"),
        (lambda c: c.update(format="other"), "format is 'other', not 'latentreward-reward-model'"),
        (lambda c: c.pop("head"), "head is missing; download it again"),
        (lambda c: c.pop("noise"), "noise is missing; download it again"),
        (lambda c: c.update(noise={"sigmas": [3]}), r"noise: noise\.sigmas holds 3"),
        (lambda c: c.update(noise=[]), "noise is .*, not a mapping of settings"),
        (lambda c: c.update(image_sizes={"class": "Path"}), "image_sizes: unknown class 'Path'"),
        (lambda c: c.update(image_sizes={"class": "NearestBucket", "init_args": {"buckets": 3}}), "image_sizes: "),
        (lambda c: c.update(image_sizes={"class": "NearestBucket", "init_args": {"buckets": []}}), "image_sizes: "),
        (lambda c: c.update(calibration={"mean": 0}), "calibration: expected the entries"),
        (lambda c: c.update(adapters=["../../etc"]), r"adapters\[0\]: String should match pattern .*, not "),
        (lambda c: c.update(adapters=[]), r"config\.json does not name adapter, which lies beside it"),
        (lambda c: c.update(adapters=["nothing"]), "the backbone has no part 'nothing'"),
        (lambda c: c.update(adapters=["vae"]), "cannot load .*adapter_config.json"),
        (lambda c: c.update(own_weights=["/etc/passwd"]), r"own_weights\[0\]: String should match pattern .*, not "),
        (lambda c: c.update(own_weights=["unet"]), "lacks backbone.safetensors"),
        (lambda c: c.update(backbone="sd35_tiny"), "backbone is no"),
        (lambda c: c["backbone"].update({"class": "sd35_medum"}), "did you mean 'sd35_medium'"),
        (lambda c: c["backbone"]["init_args"].update(num_layers=99), "num_layers=99 must lie in"),
        (lambda c: c["backbone"]["init_args"].update(num_layers="three"), "config.json: backbone: "),
        (lambda c: c["backbone"]["init_args"].update(unknown=1), "config.json: backbone: .*unknown"),
        (lambda c: c["head"]["init_args"].update(num_heads=0), "config.json: head: "),
        (lambda c: c["head"]["init_args"].update(num_queries=10**15), "config.json: head: "),
        (lambda c: c["head"]["init_args"].update(num_queries=5), "tensor query_tokens has shape"),
        (lambda c: c["head"]["init_args"].update(spec=1), "config.json: head: "),
    ],
)
def test_damaged_config(change: Callable[[dict[str, Any]], object], message: str, copies: dict[str, Path]) -> None:
    edit_json(copies["lora"] / "config.json", change)
    refused(copies["lora"], message)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"', "[" * 100_000, "{" * 30])
def test_json_that_is_no_config(content: str, copies: dict[str, Path]) -> None:
    (copies["lora"] / "config.json").write_text(content)
    refused(copies["lora"], r"config\.json is damaged")


def test_a_foreign_head_needs_trust(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "lrm", "sd15")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("CLIPProjectionHead", f"{ForeignHead.__module__}.ForeignHead"))
    refused(tmp_path / "run", r"head: class '.*ForeignHead' is not registered .* trust_remote_code=True")
    model = RewardModel.from_pretrained(tmp_path / "run", trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved")
    refused(tmp_path / "saved", r"head: class '.*ForeignHead' is not registered .* trust_remote_code=True")
    again = RewardModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(again.head) is ForeignHead
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(again.score_latents("a cat", latents), model.score_latents("a cat", latents))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(target_modules=["nothing"]), "adapter_config.json"),
        (lambda c: c.update(r="two"), "adapter_config.json"),
        (lambda c: c.update(r=3), "adapter_config.json: rank 3 does not fit"),
        (lambda c: c.update(rank_pattern={"(": 2}), "adapter_config.json"),
    ],
)
def test_damaged_adapter_settings(change: Callable[[dict[str, Any]], object], message: str, copies: dict) -> None:
    edit_json(copies["lora"] / "adapter/adapter_config.json", change)
    refused(copies["lora"], message)


def test_settings_of_the_adapter_that_would_import_or_compute_are_not_read(copies: dict[str, Path]) -> None:
    evil = {
        "megatron_config": {"a": 1},
        "megatron_core": "antigravity",
        "init_lora_weights": "pissa",
        "auto_mapping": 1,
    }
    edit_json(copies["lora"] / "adapter/adapter_config.json", lambda c: c.update(evil))
    RewardModel.from_pretrained(copies["lora"])


def test_published_layouts_half_downloaded(tmp_path: Path) -> None:
    write_lrm(tmp_path / "lrm", "sd15")
    write_dina(tmp_path / "dina")
    (tmp_path / "lrm" / "state_dict.pt").unlink()
    refused(tmp_path / "lrm", "lacks state_dict.pt; download it again")
    (tmp_path / "dina" / "checkpoint" / "rm_head.pt").write_text(POINTER)
    refused(tmp_path / "dina", "rm_head.pt is a git-lfs pointer")
    (tmp_path / "dina" / "checkpoint" / "rm_head.pt").unlink()
    refused(tmp_path / "dina", "lacks checkpoint/rm_head.pt; download it again")


def test_settings_that_do_not_go_with_what_lies_there(copies: dict[str, Path]) -> None:
    refused(copies["lora"], "config is set, but .* needs none", config="run.yaml")
    refused(copies["lora"], "revision='v1' is for hub ids", revision="v1")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_not_floating_point(dtype: torch.dtype, copies: dict[str, Path]) -> None:
    tensors = load_file(path := copies["full"] / "backbone.safetensors")
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file({**tensors, name: tensors[name].to(dtype)}, path)
    refused(copies["full"], rf"tensor {name} is {dtype}, expected floating point")
