"""The VAE of FLUX.1, which several families have, in small."""

from diffusers import AutoencoderKL

LEVELS = 4


def flux_vae() -> AutoencoderKL:
    """Sixteen channels and an eighth of the size, with FLUX.1's scale and shift."""
    return AutoencoderKL(
        block_out_channels=(4,) * LEVELS, down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS, layers_per_block=1, latent_channels=16, norm_num_groups=2,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
