"""Qwen3-VL, the text encoder of Krea 2 and Ideogram 4, in small."""

from transformers import Qwen3VLConfig, Qwen3VLModel

from tests.tiny_pipelines import WIDTH


def text_encoder(rows: int, layers: int) -> Qwen3VLModel:
    """A language model, and a vision tower that must never be read."""
    text = {
        "vocab_size": rows, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [2, 2, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
              "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
