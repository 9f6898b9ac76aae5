"""A recorded checkpoint, loaded and exported again, has the recorded files' names, shapes and values."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor

from latentreward.reward import PublishedSettings, RewardModel
from latentreward.reward.scoring.exporting import export_reward
from tests.golden.catalogue import Case, cases
from tests.golden.closeness import assert_close
from tests.golden.test_dina_backbone import FLOAT32_EPS, SCORE, column, model_of, score_at
from tests.golden.test_saved_models import base_of_lrm, config_of, lrm_scores


def keys_of(section: Any) -> Any:
    """Names of all entries, section by section."""
    return {name: keys_of(value) for name, value in section.items()} if isinstance(section, dict) else None


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("case", cases("dina/backbone"), ids=lambda case: case.name)
@torch.no_grad()
def test_diffusion_rm(case: Case, tmp_path: Path) -> None:
    theirs, ours = case.path.parent, tmp_path / "exported"
    lines = export_reward(model_of(case), ours, "diffusion-rm", base_name="local-tiny")
    rms_eps, data = case.options.get("rms_eps") or FLOAT32_EPS, case.tensors()
    assert f"--published.rms_eps {rms_eps} --published.t5_length 256" in lines[0]
    assert len(lines) == 2
    config, recorded = config_of(ours), config_of(theirs)
    assert keys_of(config) == keys_of(recorded)
    width = config["model"]["reward_head"].pop("width")
    assert recorded["model"]["reward_head"].pop("width") in (-1, width)
    known = {name: value for name, value in config["model"].items() if value is not None}
    assert known == {name: recorded["model"][name] for name in known}
    assert config["training"]["add_noise"] == recorded["training"]["add_noise"]
    heads = [torch.load(folder / "checkpoint" / "rm_head.pt", weights_only=True) for folder in (ours, theirs)]
    assert_same_tensors(*heads)
    adapters = [folder / "checkpoint" / "backbone_lora" for folder in (ours, theirs)]
    assert_same_tensors(*(load_file(folder / "adapter_model.safetensors") for folder in adapters))
    settings, expected = (PeftConfig.from_pretrained(folder) for folder in adapters)
    assert (settings.r, settings.lora_alpha) == (expected.r, expected.lora_alpha)
    base = (theirs / case.options["base_dir"]).parent
    again = RewardModel.from_pretrained(ours, base=str(base), published=PublishedSettings(rms_eps=rms_eps))
    score = score_at(again, data, *case.options["ensemble_u"])
    assert torch.equal(score, score_at(model_of(case), data, *case.options["ensemble_u"]))
    assert_close(column(score), data["ens.score"], "ens", **SCORE)


@pytest.mark.parametrize("case", cases("dina/backbone")[:1], ids=lambda case: case.name)
def test_use_text_features_changes_no_score(case: Case, tmp_path: Path) -> None:
    """The authors' code reads ``text_head_idx`` either way; the flag only says which layers got LoRA."""
    shutil.copytree(case.path.parent, tmp_path / "copy", copy_function=shutil.copyfile)
    config = config_of(tmp_path / "copy")
    config["model"]["use_text_features"] = False
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    base = (case.path.parent / case.options["base_dir"]).parent
    published = PublishedSettings(rms_eps=case.options.get("rms_eps") or FLOAT32_EPS)
    model, data = RewardModel.from_pretrained(tmp_path / "copy", base=str(base), published=published), case.tensors()
    assert_close(column(score_at(model, data, *case.options["ensemble_u"])), data["ens.score"], "ens", **SCORE)


@pytest.mark.parametrize("case", [*cases("lpo/01"), *cases("lpo/02")], ids=lambda case: case.name)
def test_lpo(case: Case, tmp_path: Path) -> None:
    theirs, ours = case.folder("checkpoint"), tmp_path / "exported"
    base = base_of_lrm(theirs, "sdxl" if case.group.endswith("02") else "sd15", tmp_path / "base")
    shutil.copytree(theirs / "unet", base / "unet", copy_function=shutil.copyfile, dirs_exist_ok=True)
    model = RewardModel.from_pretrained(theirs, base=str(base))
    assert export_reward(model, ours, "lpo")[:1] == [
        f"load it with --base {base} --published.guidance 7.5 --published.multi_scale plain"
    ]
    places = [*theirs.rglob("*.safetensors"), *theirs.rglob("config.json"), theirs / "state_dict.pt"]
    assert {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()} == {
        path.relative_to(theirs) for path in places
    }
    for path in theirs.rglob("*.safetensors"):
        assert_same_tensors(load_file(ours / path.relative_to(theirs)), load_file(path))
    recorded = config_of(theirs / "unet")
    del recorded["_name_or_path"]  # where the network came from
    assert config_of(ours / "unet") == recorded
    for part in ("text_encoder", "text_encoder_2"):
        if (theirs / part).is_dir():
            found, recorded = config_of(ours / part), config_of(theirs / part)
            shared = found.keys() & recorded.keys() - {"transformers_version"}
            assert {name: found[name] for name in shared} == {name: recorded[name] for name in shared}
            assert {"hidden_size", "eos_token_id", "projection_dim", "vocab_size"} <= shared
    states = [torch.load(folder / "state_dict.pt", weights_only=True) for folder in (ours, theirs)]
    found, expected = ({name: dict(part) for name, part in s.items() if name != "logit_scale"} for s in states)
    assert found.keys() == expected.keys()
    for part, tensors in expected.items():
        assert_same_tensors(found[part], tensors)
    assert torch.tensor(states[0]["logit_scale"]) == torch.tensor(states[1]["logit_scale"])
    ids = [
        torch.randint(
            text["vocab_size"], (2, text["max_position_embeddings"]), generator=torch.Generator().manual_seed(1)
        )
        for text in (config_of(path) for path in sorted(theirs.glob("text_encoder*")))
    ]
    again = RewardModel.from_pretrained(ours, base=str(base))
    assert torch.equal(lrm_scores(again, ids), lrm_scores(model, ids))
