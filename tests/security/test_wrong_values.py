"""Damaged, half downloaded and wrong files are one line: no traceback, no hang, no memory beyond that of the files."""

import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from latentreward.apps.cli import main
from latentreward.core.errors import InputError, printable
from latentreward.data.image_sizes import ImageSizes, OneSize
from latentreward.reward import RewardModel
from latentreward.reward.scoring import stored
from latentreward.reward.scoring.recipe import SETTINGS
from latentreward.reward.scoring.stored import sizes_record
from tests.marks import slow_after
from tests.tiny_pipelines import pipeline_folder

ESCAPE = "\x1b]0;title\x07\x1b[31m"
LAYERS = "(([a-z0-9_.]+)+)+!"
"""Regular expression that takes for ever on the name of a layer."""
NAN = float("nan")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
GONE = object()
Change = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Let this process take 6 GiB more than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def of_json(name: str, *keys: str, value: Any) -> Change:
    """Set an entry of a JSON file; :data:`GONE` takes it away."""

    def change(folder: Path) -> None:
        content = inner = json.loads((folder / name).read_text())
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        if value is GONE:
            del inner[keys[-1]]
        (folder / name).write_text(json.dumps(content))

    return change


def config(*keys: str, value: Any) -> Change:
    return of_json("config.json", *keys, value=value)


def sizes(name: str, **settings: Any) -> Change:
    return config("image_sizes", value={"class": name, "init_args": settings})


def head(**settings: Any) -> Change:
    return config("head", "init_args", value=settings)


def backbone(name: str, value: Any) -> Change:
    return config("backbone", "init_args", name, value=value)


def adapter(name: str, value: Any) -> Change:
    return of_json("adapter/adapter_config.json", name, value=value)


def published(*keys: str, value: Any) -> Change:
    return config("model", *keys, value=value)


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def of_pickle(name: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change what ``torch.save`` has written, or a file of safetensors."""

    def apply(folder: Path) -> None:
        path = folder / name
        content = load_file(path) if path.suffix == ".safetensors" else dict(torch.load(path, weights_only=True))
        change(content)
        save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)

    return apply


def of_checkpoint(**entries: Any) -> Change:
    return of_pickle("reward.ckpt", lambda content: content.update(entries))


def of_weights(value: Any) -> Change:
    return of_pickle("reward.ckpt", lambda content: content["state_dict"].update({"model.head.head.bias": value}))


def of_run(part: str, **settings: Any) -> Change:
    def change(folder: Path) -> None:
        content = yaml.safe_load((folder / "config.yaml").read_text())
        content["model"]["init_args"][part]["init_args"].update(settings)
        (folder / "config.yaml").write_text(yaml.safe_dump(content))

    return change


def tensors(name: str, tensor: str) -> list[tuple[Change, str]]:
    """A tensor of a file that is missing, too much, or of another shape or type."""
    shown = re.escape(tensor.removeprefix(PEFT))
    return [
        (of_pickle(name, lambda t: t.pop(tensor)), f"missing tensor {shown}"),
        (of_pickle(name, lambda t: t.update(surplus=torch.zeros(1))), "unexpected tensor surplus"),
        (of_pickle(name, lambda t: t.update({tensor: t[tensor][..., :1].clone()})), rf"tensor {shown} has shape \("),
        (of_pickle(name, lambda t: t.update({tensor: t[tensor].to(torch.int8)})), f"{shown} is torch.int8, expected"),
    ]


PEFT = "base_model.model."
TO_Q = f"{PEFT}transformer_blocks.0.attn.to_q.lora_A.weight"
HEAD_PT, ADAPTER = "checkpoint/rm_head.pt", "checkpoint/backbone_lora/adapter_model.safetensors"
CASES: dict[str, list[tuple[Change, str]]] = {
    "model": [
        (sizes("OneSize", height=16, width=16, resize="x"), "image_sizes: resize: "),
        (adapter("target_modules", LAYERS), "target_modules is "),
        (adapter("r", 10**7), "rank 10000000"),
        (head(width=10**7), "the file holds"),
        (sizes("OneSize", height=10**5, width=10**5), "image_sizes: 100000x100000"),
        (sizes("OneSize", height="16", width=16), "image_sizes: height: "),
        (sizes("NearestBucket", buckets=[[8, 8.5]]), r"buckets\[0\]\[1\]: "),
        (sizes("NearestBucket", buckets=[]), "image_sizes: buckets is empty"),
        (sizes("Path"), "image_sizes: unknown class 'Path'"),
        (config("noise", "noise_key", value="x"), "noise.noise_key: "),
        (config("noise", "sigmas", value=[NAN]), r"noise.sigmas\[0\]: "),
        (config("noise", value={"sigmas": [3]}), r"noise\.sigmas holds 3"),
        (config("noise", value={"timesteps": [1.0] * 20_000}), "levels times seeds are 20000"),
        (config("noise", value={"unknown": 1}), r"noise\.unknown: "),
        (config("format", value="other"), "format is 'other'"),
        (config("exif", value="perhaps"), "exif: it must be 'apply' or 'ignore'"),
        (config("format_version", value=2), "update latentreward"),
        (config("base", value=5), "base: "),
        (config("adapters", value=["../../etc"]), r"adapters\[0\]: "),
        (config("adapters", value=[]), r"config\.json does not name adapter"),
        (config("adapters", value=["nothing"]), "the backbone has no part 'nothing'"),
        (config("adapters", value=["vae"]), "cannot load .*adapter_config.json"),
        (config("own_weights", value=["/etc/passwd"]), r"own_weights\[0\]: "),
        (config("own_weights", value=["unet"]), "lacks backbone.safetensors"),
        (config("backbone", "class", value="sd35_medum"), "did you mean 'sd35_medium'"),
        (backbone("num_layers", 99), "num_layers=99"),
        (backbone("unknown", 1), "config.json: backbone: .*unknown"),
        (backbone("t5_length", 10**7), "t5_length=10000000 must be"),
        (head(num_heads=-1), "num_heads is -1"),
        (head(num_queries=10**15), "config.json: head: "),
        (head(num_heads=2, num_queries=5), "tensor query_tokens has shape"),
        (adapter("rank_pattern", {LAYERS: 2}), "rank_pattern holds "),
        (adapter("rank_pattern", {"(": 2}), "adapter_config.json"),
        (adapter("rank_pattern", {"to_q": 10**7}), "rank 10000000"),
        (adapter("target_modules", ["to_q"] * 10_000), "target_modules has 10000 entries"),
        (adapter("layers_to_transform", [0] * 10_000), "layers_to_transform has 10000 entries"),
        (adapter("r", 3), "adapter_config.json: rank 3 does not fit"),
        *(
            (text("config.json", content), r"config\.json is damaged")
            for content in ("[]", "3", "[" * 100_000, "{" * 30)
        ),
        *tensors("head.safetensors", "head.weight"),
        *tensors("adapter/adapter_model.safetensors", TO_Q),
    ],
    "whole": [
        *tensors("head.safetensors", "visual_projection.weight"),
        *tensors("backbone.safetensors", "unet.conv_in.weight"),
    ],
    "dina": [
        (published("visual_head_idx", value=5), "model.visual_head_idx: "),
        (published("reward_head", "width", value="x"), "reward_head.width: "),
        (published("reward_head", "num_queries", value=-1), "num_queries is -1"),
        (published("use_t_embed", value=False), "model.use_t_embed: "),
        (published("num_transformer_layers", value=2), "reaches block 3"),
        (published("visual_head_idx", value=[1]), "layer_adapters_visual"),
        (without(HEAD_PT), f"lacks {HEAD_PT}; download it again"),
        (text(HEAD_PT, POINTER), "rm_head.pt is a git-lfs pointer"),
        (without("checkpoint/backbone_lora/adapter_config.json"), "lacks adapter_config.json"),
        (text(ADAPTER, "x"), "cannot load"),
        *tensors(HEAD_PT, "head.weight"),
        *tensors(ADAPTER, TO_Q),
    ],
    "lrm": [
        (of_json("text_encoder/config.json", "num_hidden_layers", value=10**5), "more than 100 layers"),
        (of_json("unet/config.json", "layers_per_block", value=10**7), "more than 100 layers"),
        (of_json("text_encoder/config.json", "max_position_embeddings", value=3 * 10**8), "above 1048576"),
        (of_json("unet/config.json", "sample_size", value=10**7), "sample_size is 10000000"),
        (of_json("text_encoder/config.json", "hidden_size", value="x"), "cannot load .*text_encoder"),
        (of_pickle("state_dict.pt", lambda s: s.pop("visual_projection")), "missing tensor visual_projection"),
        (of_pickle("state_dict.pt", lambda s: s.update(extra=1)), "extra"),
        (
            of_pickle("state_dict.pt", lambda s: s["visual_projection"].pop("weight")),
            "missing tensor visual_projection",
        ),
        (
            of_pickle("state_dict.pt", lambda s: s["visual_projection"].update(weight=torch.zeros(16, 7))),
            "visual_projection.weight has shape",
        ),
        *((without(name), f"lacks {name}; download it again") for name in ("unet/config.json", "state_dict.pt")),
        (without("text_encoder/config.json"), "lacks text_encoder/config.json; download it again"),
    ],
    "run": [
        (of_checkpoint(base={"names": 5}), "base: it lacks"),
        (of_weights("x"), "model.head.head.bias is"),
        (of_run("backbone", lora={"rank": 10**7, "alpha": 1.0}), "rank 10000000"),
        (of_checkpoint(callbacks=[1], image_sizes={"class": "OneSize", "init_args": {"height": 8}}), "image_sizes: "),
        (of_weights(torch.zeros(1, device="meta")), "model.head.head.bias is"),
        (of_weights(torch.zeros(1, dtype=torch.int8)), "head.bias is torch.int8, expected floating point"),
        (of_checkpoint(image_sizes={"class": "os.system", "init_args": {}}), "image_sizes: unknown class 'os.system'"),
        (of_run("head", width=10**7), "the file holds"),
    ],
}
ROWS = [(layout, *row) for layout, rows in CASES.items() for row in rows]
ORDER = dict.fromkeys([*range(0, len(ROWS), 11), *range(len(ROWS))])  # a few of each layout first


@pytest.mark.parametrize(("layout", "change", "key"), slow_after(10, [ROWS[n] for n in ORDER]))
def test_a_damaged_file_is_one_line(
    layout: str, change: Change, key: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "check_hash", lambda path, *_: path)  # it would speak first
    folder = shutil.copytree(good / layout, tmp_path / "spoilt")
    change(folder)
    base = {"lrm": pipeline_folder("sd15")}.get(layout)
    with pytest.raises(InputError, match=key) as caught:
        RewardModel.from_pretrained(folder, base=base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", slow_after(1, ["model", "whole"]))
def test_half_downloaded(layout: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "check_hash", lambda path, *_: path)
    folder = Path(shutil.copytree(good / layout, tmp_path / "half"))
    for path in [*folder.rglob("*.json"), *folder.rglob("*.safetensors")]:
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(InputError, match=f"lacks {path.name}; download it again"):
            RewardModel.from_pretrained(folder)
        path.write_text(POINTER)
        with pytest.raises(InputError, match=rf"{path} is a git-lfs pointer, not the file; run `git lfs pull`"):
            RewardModel.from_pretrained(folder)
        for content in (b"", whole[:20], whole[: len(whole) // 2], whole[:-3], b"\xff" * 100):
            path.write_bytes(content)
            with pytest.raises(InputError, match=rf"{path}.*download it again"):
                RewardModel.from_pretrained(folder)
        path.write_bytes(whole)
    RewardModel.from_pretrained(folder)


@pytest.mark.slow
def test_the_record_of_the_base_is_compared_too(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "check_hash", lambda path, *_: path)
    folder, base = Path(shutil.copytree(good / "model", tmp_path / "model")), "base.safetensors"
    name = next(name for name in load_file(folder / base) if name.startswith("transformer."))
    for change, message in (
        (lambda t: t.update({name: t[name][:3].clone()}), "differs from that of"),
        (lambda t: t.pop(name), f"has another weight, {name}"),
        (lambda t: t.update(surplus=torch.zeros(4)), "lacks surplus"),
    ):
        of_pickle(base, change)(folder)
        with pytest.raises(InputError, match=message):
            RewardModel.from_pretrained(folder)


def test_settings_of_the_adapter_that_would_import_or_compute_are_not_read(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good / "model", tmp_path / "model"))
    evil = {"megatron_config": {"a": 1}, "megatron_core": "antigravity", "init_lora_weights": "pissa"}
    for name, value in {**evil, "auto_mapping": 1}.items():
        adapter(name, value)(folder)
    RewardModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "entries",
    slow_after(
        1,
        [
            {"callbacks": {"TrainableEMA": {"updates": 1, "average": [1]}}, "global_step": torch.zeros(3)},
            {"callbacks": None, "global_step": "x"},
            {"hyper_parameters": [1]},
        ],
    ),
)
def test_entries_that_no_reward_needs_are_left_out(entries: dict[str, Any], good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good / "run", tmp_path / "spoilt")
    of_checkpoint(**entries)(folder)
    RewardModel.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["training"]["steps"] is None


@pytest.mark.parametrize("value", [torch.zeros(3), [1], {"training": {"data": torch.zeros(1)}}])
def test_settings_in_a_checkpoint_are_plain_values(value: Any, good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good / "run", tmp_path / "spoilt")
    (folder / "config.yaml").unlink()
    of_checkpoint(**{SETTINGS: value})(folder)
    with pytest.raises(InputError, match=f"{SETTINGS} is of another version"):
        RewardModel.from_pretrained(folder)


def test_sizes_that_would_not_load_are_not_saved() -> None:
    rule: ImageSizes = OneSize(10**5, 10**5)
    with pytest.raises(InputError, match="100000x100000 is not a size"):
        sizes_record(rule)


def test_names_do_not_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (300, 300)).save("a.png")
    rows = [
        {"prompt": "p", "chosen": "a.png", "rejected": f"{ESCAPE}.png"},
        {"prompt": "é", "chosen": "a.png", "rejected": "../b.png", "pair_id": f"{ESCAPE}\u202e"},
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["inspect", "pairs.jsonl"])
    with pytest.raises(SystemExit):
        main(["inspect", f"{ESCAPE}none"])
    told = capsys.readouterr()
    assert "missing file" in told.out and r"pair \x1b]0;title\x07\x1b[31m\u202e: image" in told.out
    assert not {"\x1b", "\x07", "\u202e"} & {*told.out, *told.err}
    assert printable("日本 é\n½") == "日本 é\n½"


@pytest.mark.slow
def test_an_estimate_reads_the_shipped_files_and_asks_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "evil_module.py").write_text("open('canary', 'w')\n")
    here = "model: {class_path: LRMModule, init_args: {backbone: sd_tiny, head: {class_path: evil_module.Head}}}\n"
    (tmp_path / "configs" / "model" / "dina_lrm_tiny.yaml").write_text(here)
    estimate = ["fit", "--config=configs/align/lpo_sd35_tiny.yaml", "--estimate"]
    main(estimate)
    assert "Configs of runs/dina_lrm_tiny: configs/model/dina_lrm_tiny.yaml" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*estimate, "--model.policy.source=gpt2"])
    assert "source='gpt2' is not a folder; give a folder with its configs, or OWNER/NAME" in capsys.readouterr().err
    assert not (tmp_path / "canary").exists()
