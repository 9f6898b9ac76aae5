"""Wrong values in a stranger's files are one line: no traceback, no hang, no memory beyond that of the files."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from latentreward.apps.cli import main
from latentreward.core.errors import InputError, printable
from latentreward.data.image_sizes import ImageSizes, OneSize
from latentreward.reward import RewardModel, ScoringNoise
from latentreward.reward.scoring.layouts.model_folder import sizes_record
from latentreward.reward.scoring.layouts.run import SETTINGS
from tests.alignment.rewards.stored import write_run
from tests.marks import slow_after
from tests.reward.scoring.test_published import write_dina, write_lrm
from tests.tiny_pipelines import pipeline_folder

ESCAPE = "\x1b]0;title\x07\x1b[31m"
LAYERS = "(([a-z0-9_.]+)+)+!"
"""Regular expression that takes for ever on the name of a layer."""
NAN = float("nan")
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_run(folder / "run", "dina", "sd35", lora={"rank": 2, "alpha": 3.0}, tuning="lora")
    RewardModel.from_pretrained(folder / "run").save_pretrained(folder / "model", base=pipeline_folder("sd35"))
    write_dina(folder / "dina")
    write_lrm(folder / "lrm", "sd15")
    return folder


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Let this process take 6 GiB more than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def of_json(name: str, *keys: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        content = inner = json.loads((folder / name).read_text())
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (folder / name).write_text(json.dumps(content))

    return change


def of_checkpoint(**entries: Any) -> Change:
    def change(folder: Path) -> None:
        content = torch.load(folder / "reward.ckpt", weights_only=True)
        torch.save({**content, **entries}, folder / "reward.ckpt")

    return change


def of_run(part: str, **settings: Any) -> Change:
    def change(folder: Path) -> None:
        content = yaml.safe_load((folder / "config.yaml").read_text())
        content["model"]["init_args"][part]["init_args"].update(settings)
        (folder / "config.yaml").write_text(yaml.safe_dump(content))

    return change


def of_weights(value: Any) -> Change:
    def change(folder: Path) -> None:
        content = torch.load(folder / "reward.ckpt", weights_only=True)
        content["state_dict"]["model.head.head.bias"] = value
        torch.save(content, folder / "reward.ckpt")

    return change


def sizes(name: str, **settings: Any) -> Change:
    return of_json("config.json", "image_sizes", value={"class": name, "init_args": settings})


def adapter(name: str, value: Any) -> Change:
    return of_json("adapter/adapter_config.json", name, value=value)


def published(*keys: str, value: Any) -> Change:
    return of_json("config.json", "model", *keys, value=value)


CASES: list[tuple[str, Change, str]] = [
    ("model", sizes("OneSize", height=16, width=16, resize="x"), "image_sizes: resize: "),
    ("model", adapter("target_modules", LAYERS), "target_modules is "),
    ("model", adapter("r", 10**7), "rank 10000000"),
    ("model", of_json("config.json", "head", "init_args", value={"width": 10**7}), "the file holds"),
    ("dina", published("visual_head_idx", value=5), "model.visual_head_idx: "),
    ("lrm", of_json("text_encoder/config.json", "num_hidden_layers", value=10**5), "more than 100 layers"),
    ("run", of_checkpoint(base={"names": 5}), "base: it lacks"),
    ("run", of_weights("x"), "model.head.head.bias is"),
    ("run", of_run("backbone", lora={"rank": 10**7, "alpha": 1.0}), "rank 10000000"),
    ("model", sizes("OneSize", height=10**5, width=10**5), "image_sizes: 100000x100000"),
    ("model", sizes("OneSize", height="16", width=16), "image_sizes: height: "),
    ("model", sizes("OneSize", height=0, width=16), "image_sizes: 0x16"),
    ("model", sizes("NearestBucket", buckets=[[8, 8.5]]), r"buckets\[0\]\[1\]: "),
    ("model", sizes("NearestBucket", buckets=[[8, 8]], resize=None), "image_sizes: resize: "),
    ("model", of_json("config.json", "noise", "noise_key", value="x"), "noise_key: "),
    ("model", of_json("config.json", "noise", "seeds", value="12"), "noise: seeds: "),
    ("model", of_json("config.json", "noise", "sigmas", value=[NAN]), r"noise: sigmas\[0\]: "),
    ("model", of_json("config.json", "head", "init_args", value={"num_heads": -1}), "num_heads is -1"),
    ("model", of_json("config.json", "head", "init_args", value={"rms_eps": "x"}), "rms_eps: "),
    ("model", of_json("config.json", "backbone", "init_args", "t5_length", value=10**7), "t5_length is 10000000"),
    ("model", adapter("rank_pattern", {LAYERS: 2}), "rank_pattern holds "),
    ("model", adapter("alpha_pattern", 5), "alpha_pattern is 5"),
    ("model", adapter("rank_pattern", {"to_q": 10**7}), "rank 10000000"),
    ("model", adapter("target_modules", ["to_q"] * 10_000), "target_modules has 10000 entries"),
    ("model", adapter("layers_to_transform", [0] * 10_000), "layers_to_transform has 10000 entries"),
    ("dina", of_json("config.json", "model", value=[1]), "model and model.reward_head"),
    ("dina", published("reward_head", value=5), "model and model.reward_head"),
    ("dina", published("num_transformer_layers", value="x"), "model.num_transformer_layers: "),
    ("dina", published("reward_head", "width", value="x"), "width: "),
    ("dina", published("reward_head", "num_attn_heads", value=0), "num_heads is 0"),
    ("dina", published("reward_head", "num_queries", value=-1), "num_queries is -1"),
    ("lrm", of_json("unet/config.json", "block_out_channels", value=5), "cannot load .*unet"),
    ("lrm", of_json("unet/config.json", "layers_per_block", value=10**7), "more than 100 layers"),
    ("lrm", of_json("text_encoder/config.json", "max_position_embeddings", value=3 * 10**8), "above 1048576"),
    ("lrm", of_json("unet/config.json", "sample_size", value=10**7), "sample_size is 10000000"),
    ("lrm", of_json("text_encoder/config.json", "hidden_size", value="x"), "cannot load .*text_encoder"),
    ("run", of_checkpoint(callbacks=[1], image_sizes={"class": "OneSize", "init_args": {"height": 8}}), "image_sizes:"),
    ("run", of_weights(torch.zeros(1, device="meta")), "model.head.head.bias is"),
    ("run", of_checkpoint(base=torch.zeros(3)), "base: it lacks"),
    ("run", of_run("head", width=10**7), "the file holds"),
]


@pytest.mark.parametrize(("layout", "change", "message"), slow_after(10, CASES))
def test_a_wrong_value_is_one_line(layout: str, change: Change, message: str, good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good / layout, tmp_path / "spoilt")
    change(folder)
    base = {"lrm": pipeline_folder("sd15")}.get(layout)
    with pytest.raises(InputError, match=message) as caught:
        RewardModel.from_pretrained(folder, base=base)
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize("settings", [{"seeds": ("1",)}, {"seeds": (True,)}, {"seeds": (1.5,)}, {"noise_key": "x"}])
def test_noise_of_wrong_types_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"whole numbers|prompt or image"):
        ScoringNoise(sigmas=(0.4,), **settings)


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
