"""docs/families.md: its family, trained and aligned as a user would."""

import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageOps
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaTokenizerFast, UMT5Config, UMT5EncoderModel

from latentreward.alignment import PolicySource, Sampling, sample_latents
from latentreward.apps.cli import main
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.diffusion.cache.store import read_plan
from latentreward.reward import GatedQFormerHead, RewardModel, edit_prompt
from tests.diffusion.cache.writing import SETTINGS, SQUARE, write_data
from tests.diffusion.families.own_families import sana_vae
from tests.processes import finish
from tests.tiny_pipelines import randomise, vae

ROOT = Path(__file__).resolve().parents[3]
PAGE, CHECK = ROOT / "docs" / "families.md", ROOT / "examples" / "check_family.py"
ROWS = ["row 0 alone", "row 1 alone"]
SHORT = {
    "aura_flow_reward.yaml": ["--data.train_pairs=16", "--data.val_pairs=8"],
    "aura_flow_lpo.yaml": ["--model.sampling.num_inference_steps=4", "--data.batches_per_epoch=2"],
}


def words() -> LlamaTokenizerFast:
    pieces = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(pieces, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return LlamaTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files beside a tiny pipeline."""
    for name, text in re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        (tmp_path / name).write_text(text)
    torch.manual_seed(0)
    tokenizer = words()
    text = UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    network = AuraFlowTransformer2DModel(
        sample_size=16, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    pipeline = AuraFlowPipeline(
        tokenizer, UMT5EncoderModel(text), vae(0.13025), network, FlowMatchEulerDiscreteScheduler(shift=1.73)
    )
    for part in (pipeline.text_encoder, pipeline.vae, pipeline.transformer):
        randomise(part)
    pipeline.save_pretrained(tmp_path / "pipeline")
    monkeypatch.setenv("AURA_FLOW", str(tmp_path / "pipeline"))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_its_check_finds_rounding_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["check_family.py", str(folder / "pipeline"), "aura_flow.AuraFlow"])
    runpy.run_path(str(CHECK))
    printed = capsys.readouterr().out.splitlines()
    assert_rounding(printed, 32, ["text tokens"])
    assert {"guidance: 3.5, of the pipeline 3.5", "idle: none"} <= {*printed}


def assert_rounding(printed: list[str], side: int, tokens: list[str]) -> None:
    """Check the lines that the page's check of a family prints; ``side`` is its native height in pixels."""
    found = [line.rsplit(": ", 1) for line in printed if re.match("latents|image|encoded|text|row|gradient", line)]
    prompts = ("a cat", 'Two Dogs (brown) on a Hill, in the Rain: "Woof!"')
    latents = [f"latents of {prompt!r} at {size}" for size in ((side, side), (side // 2, side)) for prompt in prompts]
    assert [name for name, _ in found] == [*latents, "image", "encoded", *tokens, *ROWS, "gradient"]
    assert all(float(difference) <= (1e-2 if name == "gradient" else 1e-5) for name, difference in found)


def test_its_editor_is_led_by_the_picture(folder: Path) -> None:
    family, picture = "aura_flow_edit.AuraFlowEdit", Image.new("RGB", (32, 16), "red")
    policy = PolicySource(str(folder / "pipeline"), family=family).load().eval()
    policy.edit_at(32, 16)
    edits = [edit_prompt("make it blue", one) for one in (picture, picture, ImageOps.invert(picture))]
    drawn = PromptBatch(tuple(edits), keys=("a",) * 3), Sampling(2, height=32, width=16), 3.5, 0
    latents = sample_latents(policy, *drawn)
    same, other = ((latents[0] - latents[row]).abs().max() for row in (1, 2))
    assert latents.shape == (3, 4, 16, 8) and same < 1e-6 and other > 1e-5
    with torch.no_grad():
        backbone = create_backbone("aura_flow_edit", source=str(folder / "pipeline"), visual_taps=[0, 2], text_taps=[2])
        model = RewardModel(backbone, GatedQFormerHead(backbone.feature_spec, num_queries=2, num_heads=2)).eval()
        scores = model.score_latents(edits, latents[:1].expand(3, -1, -1, -1))
        assert abs(scores[0] - scores[1]) < 1e-6 < abs(scores[0] - scores[2])
        with pytest.raises(InputError, match=r"^reward: it takes 1 picture to edit, and a prompt edits 0"):
            model.score_latents(["make it blue"], latents[:1])


def test_its_encoder_of_another_vae_scales_as_the_config_says(folder: Path) -> None:
    encoder = importlib.import_module("dc_encoder").DCEncoder(sana_vae())
    assert (encoder.space.channels, encoder.space.downscale, encoder.space.scaling_factor) == (32, 32, 0.41407)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = encoder.vae.encode(pixels).latent
        torch.testing.assert_close(encoder.encode(pixels), raw * 0.41407)
        torch.testing.assert_close(encoder.decode(raw * 0.41407), encoder.vae.decode(raw).sample)
    assert not encoder.encode(pixels.requires_grad_()).requires_grad
    assert encoder.encode(pixels, differentiable=True).requires_grad


def test_its_latents_and_prompts_are_cached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    write_data(folder / "pairs", pairs=2, sizes=[SQUARE])
    source = ["--encoder.source=pipeline", "--encoder.family=aura_flow.AuraFlow", "--encoder.text=true"]
    main(["cache", "cache", *SETTINGS, "--reader.root=pairs", *source])
    spec = read_plan(folder / "cache").spec
    assert spec.text is not None and (spec.text.num_tokens, spec.text.token_dim) == (256, 32)
    assert spec.latent_space.channels == 4


@pytest.mark.rotated
@pytest.mark.slow
def test_it_trains_a_reward_and_aligns_a_policy(folder: Path) -> None:
    commands = [shlex.split(line) for line in (folder / "commands").read_text().splitlines() if "fit" in line]
    for command in commands:
        options = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", *SHORT[command[-1]]]
        run = finish([*command[1:], *options], cwd=folder)
        assert run.returncode == 0, run.stderr[-3000:]
    assert list((folder / "runs" / "aura_flow_lpo").rglob("*.ckpt"))
