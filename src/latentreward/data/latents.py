"""Decoding of latents that a published cache stores as bytes of an ``np.save`` file."""

from io import BytesIO

import numpy as np

from latentreward.contracts import ImageRef
from latentreward.data.images import DAMAGED, EMPTY, NO_IMAGE, image_error

DTYPES = ("float16", "float32")


def decode_latents(image: ImageRef, clip: bool | None = False) -> np.ndarray:
    """Decode the latents of one image, float16 or float32, with the scale and shift that the cache's writer applied.

    They are ``(C, h, w)``, or ``(C, T, h, w)`` of a ``clip``; None takes both.

    Raises:
        ImageError: If the bytes are missing or not such an array, or if a value is not finite.
    """
    if image.data is None:
        raise image_error(image, NO_IMAGE, "the row has none")
    if not image.data:
        raise image_error(image, EMPTY, "0 bytes")
    try:
        array = np.load(BytesIO(image.data), allow_pickle=False)
    except (ValueError, OSError, EOFError, TypeError, SyntaxError) as error:  # what numpy raises on damaged bytes
        raise image_error(image, DAMAGED, f"not a whole np.save array: {error}") from error
    taken = (3, 4) if clip is None else (3 + clip,)
    axes = " or ".join("(C, h, w)" if count == 3 else "(C, T, h, w)" for count in taken)
    if not isinstance(array, np.ndarray) or array.ndim not in taken or str(array.dtype) not in DTYPES:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise image_error(image, DAMAGED, f"{found} is not a {axes} array of {' or '.join(DTYPES)}")
    if not np.isfinite(array).all():
        raise image_error(image, DAMAGED, "values that are not finite")
    return array
