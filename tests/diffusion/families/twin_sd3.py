"""A twin of SD3.5-Large: SD3's family without a second attention in its blocks."""

from tests.diffusion.families.twins import Twin
from tests.tiny_pipelines import sd3_like

TWINS = [
    Twin(
        "sd35_large", "sd3", lambda: sd3_like(sd35=True, with_t5=True, dual_attention_layers=()), size=(16, 24),
        call={"guidance_scale": 5.0}, backbone="sd35_large",
    )
]  # fmt: skip
