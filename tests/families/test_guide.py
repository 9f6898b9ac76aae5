"""docs/families.md: its family, trained and aligned as a user would."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from lightning.pytorch import LightningModule
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaTokenizerFast, UMT5Config, UMT5EncoderModel

from latentreward.apps.commands.fit import Parser
from latentreward.cache.layout import read_plan
from latentreward.cli import main
from latentreward.contracts import PromptBatch
from latentreward.policies import PolicySource
from latentreward.rollout import Sampling, sample_latents
from latentreward.settings.functions import MODE, prepare
from tests.cache.writing import SETTINGS, SQUARE, write_data
from tests.families.twins import PROMPTS, TWINS, GivenNoise, noise_for
from tests.processes import finish
from tests.tiny_pipelines import pipeline_folder, randomise, vae

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
BLOCKS = [f"block {number}" for number in range(1, 5)]
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


def test_its_check_finds_rounding_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(folder / "check_aura_flow.py"))
    printed = capsys.readouterr().out.splitlines()
    assert_rounding(printed, 32, [*BLOCKS, "output"])


def assert_rounding(printed: list[str], side: int, blocks: list[str]) -> None:
    """Check the lines that the page's check of a family prints; ``side`` is its native height in pixels."""
    found = [line.rsplit(": ", 1) for line in printed if re.match("latents|image|block|output|row|gradient", line)]
    prompts = ("a cat", "Two Dogs (brown) on a Hill, in the Rain!")
    latents = [f"latents of {prompt!r} at {size}" for size in ((side, side), (side // 2, side)) for prompt in prompts]
    assert [name for name, _ in found] == [*latents, "image", *blocks, "row 0 alone", "row 1 alone", "gradient"]
    assert all(float(difference) <= (1e-2 if name == "gradient" else 1e-5) for name, difference in found)


OTHER_SCALE = """
from latentreward.contracts import LatentSpace

class PlainUNet(PlainUNet):
    latent_space = LatentSpace(4, 2, 0.25)
"""


@pytest.mark.slow
@pytest.mark.parametrize("added", ["", OTHER_SCALE], ids=["right", "other scale"])
def test_its_check_takes_a_unet_and_tells_a_wrong_scale_of_latents(
    added: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AURA_FLOW", pipeline_folder("sd15"))
    (folder / "plain_unet.py").write_text((folder / "plain_unet.py").read_text() + added)
    check = folder / "check_aura_flow.py"
    check.write_text(check.read_text().replace("aura_flow.AuraFlow", "plain_unet.PlainUNet"))
    monkeypatch.delitem(sys.modules, "plain_unet", raising=False)
    runpy.run_path(str(check))
    printed = capsys.readouterr().out.splitlines()
    image = next(line for line in printed if line.startswith("image"))
    if added:
        assert float(image.split(": ")[1]) > 1e-2
        printed[printed.index(image)] = "image: 0"
    assert_rounding(printed, 16, [])


@pytest.mark.slow
def test_an_lrm_on_flux1_is_built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX1_PATH", TWINS["flux1_dev"].folder)
    prepare([])
    parser = Parser(parser_mode=MODE)
    parser.add_subclass_arguments(LightningModule, "model")
    text = (folder / "lrm_flux1.yaml").read_text().partition("trainer:")[0]
    module = parser.instantiate(parser.parse_string(text.replace("[19, 28]", "[2, 4]"))).model
    assert type(module.model.head).__name__ == "CLIPProjectionHead" and module.model.backbone.visual_taps == (2, 4)


def test_its_latents_and_prompts_are_cached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    write_data(folder / "pairs", pairs=2, sizes=[SQUARE])
    source = ["--encoder.source=pipeline", "--encoder.family=aura_flow.AuraFlow", "--encoder.text=true"]
    main(["cache", "cache", *SETTINGS, "--reader.root=pairs", *source])
    spec = read_plan(folder / "cache").spec
    assert spec.text is not None and (spec.text.num_tokens, spec.text.token_dim) == (256, 32)
    assert spec.latent_space.channels == 4


def test_a_plain_unet_samples_as_stable_diffusion(folder: Path) -> None:
    sources = [PolicySource(pipeline_folder("sd15"), family=path) for path in ("plain_unet.PlainUNet", None)]
    policies = [source.load().eval() for source in sources]
    noise = noise_for(policies[0].latent_shape(32, 32))
    drawn = (PromptBatch(PROMPTS, keys=PROMPTS), Sampling(3, height=32, width=32), 5.0, 0)
    found, wanted = (sample_latents(policy, *drawn, draws=GivenNoise(noise)) for policy in policies)
    torch.testing.assert_close(found, wanted)
    assert policies[0].family.noise_process.sigmas.equal(policies[1].family.noise_process.sigmas)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["GatedQFormerHead", "own_head.OwnHead"])
def test_its_memory_is_estimated(
    head: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "from latentreward.heads import GatedQFormerHead", "class OwnHead(GatedQFormerHead):", '    """My head."""'
    (folder / "own_head.py").write_text("\n".join(lines))
    monkeypatch.chdir(folder)
    main(["fit", "--config=aura_flow_reward.yaml", f"--model.head={head}", "--trainer.accelerator=cpu", "--estimate"])
    assert "memory: fit" in capsys.readouterr().out


@pytest.mark.slow
def test_it_trains_a_reward_and_aligns_a_policy(folder: Path) -> None:
    commands = [shlex.split(line) for line in (folder / "commands").read_text().splitlines() if "fit" in line]
    for command in commands:
        options = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", *SHORT[command[-1]]]
        run = finish([*command[1:], *options], cwd=folder)
        assert run.returncode == 0, run.stderr[-3000:]
    assert list((folder / "runs" / "aura_flow_lpo").rglob("*.ckpt"))
