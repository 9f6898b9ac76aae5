"""Twin of FLUX.1-Kontext, which without a picture to edit makes pictures from text."""

from diffusers import DiffusionPipeline, FluxKontextPipeline

from tests.diffusion.families.twin_flux1 import flux1, packed, unpacked
from tests.diffusion.families.twins import Twin


def pipeline() -> DiffusionPipeline:
    return FluxKontextPipeline(**{**flux1(dev=True).components, "image_encoder": None, "feature_extractor": None})


TWINS = [
    Twin(
        "flux1_kontext",
        "flux1_kontext",
        pipeline,
        call={"guidance_scale": 2.5, "max_area": 32 * 48},  # else the size is changed to an area of 1024²
        given=packed,
        found=unpacked,
        backbone="flux1_kontext",
    ),
]
