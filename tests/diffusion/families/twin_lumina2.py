"""Twin of Lumina-Image 2.0."""

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from tests.diffusion.families.flux_vae import flux_vae
from tests.diffusion.families.twins import Twin
from tests.tiny_pipelines import WIDTH


def gemma_tokenizer(**options: str) -> GemmaTokenizer:
    """A tokenizer of single characters that puts a token before each text, as Gemma's."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *map(chr, range(33, 127))]
    vocab = {word: number for number, word in enumerate(words)}
    return GemmaTokenizer(vocab=vocab, merges=[], add_bos_token=True, **options)


def gemma(tokenizer: GemmaTokenizer) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
    )  # fmt: skip
    return Gemma2Model(config)


def pipeline() -> DiffusionPipeline:
    tokenizer = gemma_tokenizer()
    transformer = Lumina2Transformer2DModel(
        in_channels=16, hidden_size=24, num_layers=4, num_refiner_layers=2, num_attention_heads=2, num_kv_heads=1,
        multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(300, 64, 64), cap_feat_dim=WIDTH,
    )  # fmt: skip
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=flux_vae(),
        text_encoder=gemma(tokenizer),
        tokenizer=tokenizer,
    )


TWINS = [Twin("lumina2", "lumina2", pipeline, backbone="lumina2")]
