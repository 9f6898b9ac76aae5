import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentreward.alignment import POLICY, Policy, PolicySource, TrainedLoRA, write_kohya
from latentreward.apps.generation import load_lora
from latentreward.apps.generation.lora import check_lora
from latentreward.apps.generation.trained_policy import TrainedPolicy
from latentreward.core.contracts import Conditioning
from latentreward.core.errors import InputError
from latentreward.diffusion import LoRA
from tests.diffusion.families.twins import TWINS
from tests.marks import rotated_after, slow_after
from tests.tiny_pipelines import pipeline_folder


def load(name: str, rank: int = 4, layers: list[str] | None = None) -> Policy:
    source = name if name.endswith("_tiny") else pipeline_folder(name)
    return PolicySource(source, lora=LoRA(rank=rank, alpha=2.0, target_modules=layers)).load().eval()


def trained(name: str, layers: list[str] | None = None) -> Policy:
    policy, generator = load(name, layers=layers), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for place, weight in policy.named_parameters():
            if f".{POLICY}." in place:
                weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    return policy


@torch.no_grad()
def predict(policy: Policy) -> torch.Tensor:
    encoded = policy.encode_prompts(["a cat"])
    conditioning = Conditioning(encoded.prompt_embeds, encoded.pooled_prompt_embeds)
    latents = torch.randn(1, *policy.latent_shape(), generator=torch.Generator().manual_seed(1))
    return policy.predict(latents, torch.tensor([501.0]), conditioning)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "style"),
    rotated_after(
        2,
        [
            ("sd35_tiny", "diffusers"),
            ("sd_tiny", "kohya"),
            ("sd_tiny", "diffusers"),
            ("sdxl", "diffusers"),
            ("sdxl", "kohya"),
        ],
    ),
)
def test_an_exported_lora_does_what_it_did(name: str, style: str, tmp_path: Path) -> None:
    policy = trained(name)
    lora = TrainedLoRA.of_policy(policy)
    lora.write_diffusers(tmp_path) if style == "diffusers" else write_kohya(lora, tmp_path)
    fresh = load(name, rank=2)
    before = predict(fresh)
    load_lora(fresh, tmp_path)
    torch.testing.assert_close(predict(fresh), predict(policy), atol=1e-4, rtol=1e-4)
    with fresh.reference():
        torch.testing.assert_close(predict(fresh), before)


@pytest.mark.slow
def test_kohyas_names_of_sdxls_original_layers_are_read(tmp_path: Path) -> None:
    """As most SDXL LoRAs have them; diffusers asks the network's config for the numbers of the blocks."""
    policy = trained("sdxl", ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"])
    file = write_kohya(TrainedLoRA.of_policy(policy), tmp_path)
    renamed = {name.replace("mid_block_attentions_0", "middle_block_1"): t for name, t in load_file(file).items()}
    save_file(renamed, file)
    fresh = load("sdxl")
    load_lora(fresh, tmp_path)
    torch.testing.assert_close(predict(fresh), predict(policy), atol=1e-4, rtol=1e-4)


def test_alphas_beside_diffusers_names_of_flux_count(tmp_path: Path) -> None:
    """As in TheLastBen/Jon_Snow_Flux_LoRA; asked for metadata alone, diffusers drops them without a word."""
    source = TWINS["flux1_schnell"].source()
    tensors = load_file(TrainedLoRA.of_policy(source.load()).write_diffusers(tmp_path))
    tensors = {name: torch.full_like(tensor, 2.0) for name, tensor in tensors.items()}
    half = torch.tensor(len(tensors[first(tensors, "lora_A.weight")]) / 2)
    alphas = {name.replace("lora_A.weight", "alpha"): half for name in tensors if name.endswith("lora_A.weight")}
    save_file(tensors | {name: alpha.clone() for name, alpha in alphas.items()}, tmp_path / "flux.safetensors")
    fresh = source.load()
    load_lora(fresh, tmp_path / "flux.safetensors")
    found = [weight for name, weight in fresh.network.named_parameters() if ".lora_B.lora." in name]
    assert len(found) == len(alphas) and all((weight == 1).all() for weight in found)


@pytest.mark.parametrize(
    ("end", "value", "message"),
    [
        ("lora_up.weight", None, r"cannot be converted: 'lora_unet_\w+\.lora_up\.weight'; get the file again"),
        ("lora_down.weight", None, r"cannot be converted: .* not been correctly renamed: lora_unet_\w+\.alpha"),
        ("alpha", float("nan"), r"lora_B\.weight or its alpha is not finite"),
    ],
)
def test_a_damaged_kohya_file_is_told_by_a_tensor(
    end: str, value: float | None, message: str, kohya: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    name = first(kohya, end)
    changed = {other: tensor for other, tensor in kohya.items() if other != name}
    save_file(changed if value is None else changed | {name: torch.tensor(value)}, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=message) as refused:
        load_lora(load("sd_tiny"), tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("end", ["hada_w1_a", "lokr_w2", "oft_blocks", "boft_R.weight"])
def test_an_adapter_of_another_kind_is_named(end: str, tmp_path: Path) -> None:
    save_file({f"lora_unet_mid_block_attentions_0_proj_in.{end}": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(
        InputError, match=rf"adapter of another kind, by its tensors {end.partition('_')[0]}_ .*give a LoRA$"
    ):
        load_lora(load("sd_tiny"), tmp_path)


@pytest.mark.parametrize("content", [{"epoch": 1}, [1], {"state_dict": {"global_step": 1}}, {"a": Path}])
def test_a_torch_file_without_tensors_alone_is_one_line(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "lora.bin")
    with pytest.raises(InputError, match=r"lora\.bin"):
        load_lora(load("sd_tiny"), tmp_path)


def test_what_is_no_lora_is_told_before_a_policy_is_loaded(tmp_path: Path) -> None:
    (tmp_path.parent / "last.ckpt").touch()
    with pytest.raises(InputError, match=r"last\.ckpt is the checkpoint of a run; give it as checkpoint"):
        check_lora(tmp_path.parent / "last.ckpt")
    with pytest.raises(InputError, match=r"^lora: .*gone does not exist; give"):
        check_lora(tmp_path / "gone")
    with pytest.raises(InputError, match=r"holds no \.safetensors or \.bin file"):
        check_lora(tmp_path)
    (tmp_path / "head.safetensors").touch()
    with pytest.raises(InputError, match="is a reward model, no LoRA of a generator"):
        check_lora(tmp_path)


def renamed(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def first(tensors: dict[str, torch.Tensor], end: str) -> str:
    return next(name for name in tensors if name.endswith(end))


@pytest.fixture(scope="module")
def kohya(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return load_file(write_kohya(TrainedLoRA.of_policy(trained("sd_tiny")), tmp_path_factory.mktemp("kohya")))


CHANGES = {
    "torch.compile": lambda t: renamed(t, "transformer.", "transformer._orig_mod."),
    "peft in memory": lambda t: renamed(t, ".weight", ".default.weight"),
    "other blocks": lambda t: renamed(t, "blocks.1.", "blocks.7."),
    "A alone": lambda t: {name: tensor for name, tensor in t.items() if "lora_A" in name},
    "narrower": lambda t: {name: tensor[:, :1].clone() if "lora_A" in name else tensor for name, tensor in t.items()},
    "no rank": lambda t: {n: x[:0].clone() if "lora_A" in n else x[:, :0].clone() for n, x in t.items()},
    "DoRA of kohya": lambda t: t | {first(t, "lora_A.weight").replace("lora_A.weight", "dora_scale"): torch.ones(24)},
    "LoHa": lambda t: t | {"transformer.transformer_blocks.0.attn.to_q.hada_w1_a": torch.ones(24, 2)},
    "a NaN": lambda t: t | {first(t, "lora_B.weight"): t[first(t, "lora_B.weight")] * float("nan")},
    "two adapters": lambda t: t | renamed({n: x.clone() for n, x in t.items()}, ".weight", ".default.weight"),
}
USED = ("torch.compile", "peft in memory")
"""Changes after which the file is still wholly usable, if it tells alpha."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Policy, dict[str, torch.Tensor], dict[str, str]]:
    """A trained policy, and the tensors and metadata of its LoRA file."""
    policy = trained("sd35_tiny")
    file = TrainedLoRA.of_policy(policy).write_diffusers(tmp_path_factory.mktemp("exported"))
    with safe_open(file, "pt") as opened:
        return policy, load_file(file), opened.metadata()


@pytest.mark.parametrize("change", slow_after(8, CHANGES))
def test_every_tensor_is_used_or_the_file_is_refused(change: str, exported: tuple, tmp_path: Path) -> None:
    policy, tensors, metadata = exported
    save_file(changed := CHANGES[change](tensors), tmp_path / "lora.safetensors", metadata)
    fresh = load("sd35_tiny", rank=2)
    if change in USED:
        load_lora(fresh, tmp_path)
        torch.testing.assert_close(predict(fresh), predict(policy), atol=1e-4, rtol=1e-4)
        save_file(changed, tmp_path / "lora.safetensors")
        with pytest.raises(InputError, match=r"has names as in memory, such as .*, and tells no alpha; save it by"):
            load_lora(load("sd35_tiny"), tmp_path)
        return
    before = predict(fresh)
    with pytest.raises(
        InputError, match=r"^lora: .*(without a place in the network|cannot be used|several|is not finite|kind|rank 0)"
    ) as refused:
        load_lora(fresh, tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    torch.testing.assert_close(predict(fresh), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 10**8}, "rank 100000000"),
        ({"alpha_pattern": {"(a+)+(b+)+(c+)+$": 3}}, "alpha_pattern holds"),
        ({"alpha_pattern": {f"layer{n}": 1 for n in range(10_000)}}, "10000 entries"),
        ({"rank_pattern": {"a" * 1000: 4}}, "rank_pattern holds"),
        ({"alpha_pattern": ["to_q"]}, "alpha_pattern is"),
        *(({"lora_alpha": value}, "alpha: ") for value in ("16", float("inf"), 10**400)),
        ({"rank_pattern": {"(.*a.*)*(.*a.*)*(.*a.*)*b": 4}}, "rank_pattern holds"),
        ({"target_modules": "(.*a.*)*(.*a.*)*(.*a.*)*b"}, None),
        ({"lora_dropout": 0.9, "bias": "all", "layers_to_transform": [0], "modules_to_save": ["proj_out"]}, None),
    ],
)
def test_settings_of_a_stranger_cost_nothing(
    settings: dict[str, object], message: str | None, exported: tuple, tmp_path: Path
) -> None:
    policy, tensors, metadata = exported
    noted = json.loads(metadata["lora_adapter_metadata"]) | {f"transformer.{k}": v for k, v in settings.items()}
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(noted)})
    fresh = load("sd35_tiny", rank=2)
    if message:
        with pytest.raises(InputError, match=message):
            load_lora(fresh, tmp_path)
        return
    load_lora(fresh, tmp_path)  # ranks and layers are those of the tensors, and there is no dropout
    torch.testing.assert_close(predict(fresh), predict(policy), atol=1e-4, rtol=1e-4)


def test_metadata_give_no_key_twice(exported: tuple, tmp_path: Path) -> None:
    _, tensors, metadata = exported
    twice = {"lora_adapter_metadata": '{"transformer.r": 9, ' + metadata["lora_adapter_metadata"][1:]}
    save_file(tensors, tmp_path / "lora.safetensors", twice)
    with pytest.raises(InputError, match=r"^lora: .*: key 'transformer\.r' is given twice"):
        load_lora(load("sd35_tiny", rank=2), tmp_path)


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_dora": True}, {"use_rslora": True}])
def test_options_of_peft_are_loaded_as_diffusers_loads_them(options: dict[str, bool], tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from peft import LoraConfig, get_peft_model_state_dict

    source = PolicySource("sd35_tiny").pipeline()
    network = source.load(SD3Transformer2DModel, "transformer").float()
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "ff.net.2"], init_lora_weights=False, **options)
    network.add_adapter(config)
    noted = {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items() if v is not None}
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(network), transformer_lora_adapter_metadata=noted
    )
    loaded = load("sd35_tiny")
    load_lora(loaded, tmp_path)
    found = predict(loaded)
    loaded.network = network.eval()
    torch.testing.assert_close(found, predict(loaded), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_metadata_import_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field of peft's config names a module; so does the folder that such a file may come in."""
    policy = trained("sd_tiny")
    path = TrainedLoRA.of_policy(policy).write_diffusers(tmp_path)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    metadata |= {"unet.megatron_config": {"hidden_size": 1}, "unet.megatron_core": "megatron.core"}
    save_file(load_file(path), path, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "core.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    fresh = load("sd_tiny", rank=2)
    load_lora(fresh, path)
    torch.testing.assert_close(predict(fresh), predict(policy), atol=1e-4, rtol=1e-4)


def test_a_policy_whose_checkpoint_was_written_again_is_another(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    file.touch()
    policy = TrainedPolicy(PolicySource("sd_tiny"), checkpoint=file)
    before = policy.identity()
    assert policy.identity() == before
    os.utime(file, ns=(0, 1))
    assert policy.identity() != before
