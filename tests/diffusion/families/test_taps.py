"""Features at each tap equal what hooks see in the untouched network."""

import torch

from latentreward.core.registry import create_backbone
from tests.diffusion.families.twins import PROMPTS, Twin, every_network, noise_for


@every_network
def test_taps_equal_hooks(twin: Twin) -> None:
    """Single-stream blocks give joint sequences, of which the family's test says where the image's tokens lie."""
    policy = twin.source().load().eval()
    family, taps = policy.family, [*range(1, twin.layers)]
    backbone = create_backbone(twin.backbone, source=twin.folder, num_layers=twin.layers - 1, visual_taps=taps,
                               text_taps=taps, tuning="frozen").eval()  # fmt: skip
    latents, sigma = noise_for(family.latent_shape(*twin.size)), torch.tensor([0.3, 0.8])
    outputs: dict[int, object] = {}
    for number, block in enumerate(family.blocks(policy.network), start=1):
        block.register_forward_hook(lambda module, args, output, number=number: outputs.update({number: output}))
    with torch.no_grad():
        conditioning = policy.encode_prompts(PROMPTS)
        policy.predict(latents, sigma * 1000, conditioning)
        features = backbone(latents, sigma * 1000, backbone.encode_prompts(PROMPTS))
    for tap, visual, text in zip(taps, features.visual, features.text, strict=True):
        found = {tensor.shape: tensor for tensor in (visual, text)}
        seen = outputs[tap] if isinstance(outputs[tap], tuple | list) else [outputs[tap]]
        if twin.family == "hidream" and len(seen) == 2:  # with the text of the block's own layer, which ends with it
            seen = [each[:, : max(visual.shape[1], text.shape[1])] for each in seen]
        # ERNIE-Image's blocks have tokens before rows.
        for output in (each if len(each) == len(latents) else each.transpose(0, 1) for each in seen):
            if output.shape[1] < visual.shape[1] + text.shape[1]:
                rows = found.get(output.shape)
                assert rows is not None, f"block {tap} gives {tuple(output.shape)}"
                torch.testing.assert_close(rows, output, rtol=0, atol=1e-6)
            else:
                for row, joint in enumerate(output):
                    of_prompt = slice(None) if features.text_mask is None else features.text_mask[row]
                    for tokens in (visual[row], text[row][of_prompt]):
                        assert_part(tokens, joint)


def assert_part(tokens: torch.Tensor, joint: torch.Tensor) -> None:
    """Assert that tokens lie in a joint sequence, one after another in their own order."""
    windows = joint.double().unfold(0, len(tokens), 1).transpose(1, 2)
    assert ((windows - tokens.double()).abs().amax(dim=(1, 2)) < 1e-5).any()


@every_network
def test_output_map_is_the_prediction(twin: Twin) -> None:
    """With all blocks, the map is the velocity that the policy predicts with its own guidance as an input."""
    policy = twin.source().load().eval()
    options = {"visual_taps": [twin.layers], "text_taps": [], "output_map": True, "tuning": "frozen"}
    backbone = create_backbone(twin.backbone, source=twin.folder, **options).eval()
    latents, sigma = noise_for(policy.family.latent_shape(*twin.size)), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        expected = policy.predict(latents, sigma * 1000, policy.encode_prompts(PROMPTS))
        features = backbone(latents, sigma * 1000, backbone.encode_prompts(PROMPTS))
    torch.testing.assert_close(features.output, expected, rtol=1e-5, atol=1e-6)
