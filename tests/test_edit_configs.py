"""The tiny configs of edits: a reward of each kind of network trains on pairs of edits, and aligns the editor."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from latentreward.apps.cli import main
from latentreward.core.contracts import sources_of
from latentreward.data import JSONLPairReader, decode_image
from latentreward.tinyworld.edits import judge_edit
from latentreward.tinyworld.writers import EDIT_PARTS, write_edits
from tests.marks import rotated_after
from tools.edited_pairs import main as edited_pairs
from tools.pretraining.editors import EDITORS
from tools.pretraining.networks import save_pipeline

FOLDER = Path(__file__).parents[1] / "configs" / "edits"
QUICK = ("--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
RUNS = [("kontext_tiny", "nft"), ("ip2p_tiny", "lpo")]


def train_reward(editor: str, source: Path, folder: Path, *settings: str) -> None:
    data = ("--data.train_pairs=16", "--data.val_pairs=8", "--data.batch_size=4", f"--data.root={folder / 'pairs'}")
    configs = (FOLDER.parent / "data" / "tinyworld_edits.yaml", FOLDER / f"reward_{editor}.yaml")
    trainer = ("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.num_sanity_val_steps=0")
    run = (f"--trainer.default_root_dir={folder / 'reward'}", f"--model.backbone.source={source}", *trainer)
    checkpoint = f"--trainer.callbacks={{class_path: LastCheckpoint, init_args: {{dirpath: {folder / 'reward'}}}}}"
    main(["fit", *(f"--config={path}" for path in configs), *data, *run, checkpoint, *QUICK, *settings])


@pytest.mark.slow
@pytest.mark.parametrize(("editor", "method"), rotated_after(1, RUNS))
def test_a_reward_trains_and_aligns_its_editor(editor: str, method: str, tmp_path: Path) -> None:
    source = tmp_path / editor
    save_pipeline(EDITORS[editor](), source)
    train_reward(editor, source, tmp_path)
    steps = "--model.sampling.num_inference_steps=4"
    policy = (f"--model.policy.source={source}", f"--model.reward.path={tmp_path / 'reward' / 'last.ckpt'}", steps)
    data = ("--data.edits=4", "--data.batch_size=4", "--data.prompts_per_rollout=2")
    run = f"--trainer.default_root_dir={tmp_path / method}"
    main(["fit", f"--config={FOLDER / f'{method}_{editor}.yaml'}", *policy, *data, run, *QUICK])
    (weights,) = (tmp_path / method / "lora").glob("*.safetensors")
    assert any(value.any() for value in load_file(weights).values())


@pytest.mark.slow
def test_the_same_network_trains_without_the_sources(tmp_path: Path) -> None:
    save_pipeline(EDITORS["kontext_tiny"](), tmp_path / "kontext_tiny")
    blind = ("--data.sources=ignore", "--data.shared_prompts=keep")
    train_reward("kontext_tiny", tmp_path / "kontext_tiny", tmp_path, *blind)
    assert (tmp_path / "reward" / "last.ckpt").is_file()


@pytest.mark.slow
def test_results_of_an_editor_join_the_drawn_pairs(tmp_path: Path) -> None:
    save_pipeline(EDITORS["kontext_tiny"](), tmp_path / "editor")
    write_edits(tmp_path / "drawn", {"train": 4, "validation": 2}, prompts=1)
    settings = ("--edits=6", "--pictures=3", "--most_drawn=3", f"--output={tmp_path / 'both'}")
    edited_pairs([str(tmp_path / "editor"), str(tmp_path / "drawn"), *settings])
    pairs = [*JSONLPairReader(str(tmp_path / "both" / "train.jsonl"))]
    oracle = {row["pair_id"]: row for row in pq.read_table(tmp_path / "both" / "oracle.parquet").to_pylist()}
    assert len(pairs) > 3 and {pair.pair_id for pair in pairs} < {*oracle}
    assert len(oracle) == len(pairs) + 2  # and the validation pairs
    for pair in pairs[3:]:
        (source,) = map(decode_image, sources_of(pair.prompt))
        for image in (pair.image_a, pair.image_b):
            side = {oracle[pair.pair_id][f"key_{one}"]: one for one in "ab"}[image.image_key]
            verdict = judge_edit(source, decode_image(image), pair.prompt)
            assert [oracle[pair.pair_id][f"{part}_{side}"] for part in EDIT_PARTS] == pytest.approx(
                [verdict.utility, float(verdict.followed), verdict.kept]
            )
