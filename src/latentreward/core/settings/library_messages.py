"""Suppression of library messages that are useless to users; messages that are not listed here are shown."""

import logging
import warnings
from contextlib import suppress

from latentreward.core.errors import printable

ON_IMPORT = {
    # diffusers imports torchao where it is installed; the lines are about kernels and tensors that int8 does not use.
    "torchao": ("Failed to load",),
    "torch.utils._pytree": ("is an Enum subclass",),
    "diffusers.quantizers.torchao.torchao_quantizer": ("Unable to import `torchao` Tensor objects",),
    "transformers.utils.import_utils": ("requires torchvision",),  # pictures are resized with PIL here, on purpose
}
"""What :data:`LOGGED` is, of messages that the import of diffusers causes."""
LOGGED = {
    "lightning.pytorch.utilities.rank_zero": (
        "Tip:",  # advertises Lightning's services
        "Detected KeyboardInterrupt",  # our own line says what is kept
        "TPU available: False",  # the line about GPUs above it names the device in use
        "Restored all states from the checkpoint",  # the line "Restoring states" above it names the file
    ),
    "lightning.fabric.utilities.seed": ("Seed set to",),  # config.yaml has seed_everything
    # The empty list [] says that no part must be kept in float32.
    "diffusers.models.modeling_utils": ("should be kept in float32: [].",),
}
"""Name of a logger -> texts; a message of this logger that contains one of the texts is suppressed."""

WARNED = (
    r".isinstance\(treespec, LeafSpec\). is deprecated",  # caused by Lightning's own use of a newer torch
    r"Found \d+ module\(s\) in eval mode at the start of training",  # frozen networks and encoders are in eval mode
    # Our data modules return an empty list for a split that is not set. For an empty loader, the message names the
    # loader's class instead of `list` and is still shown.
    "Total length of `list` across ranks is zero",
    "Grad strides do not match bucket view strides",  # DDP copies gradients of 1 x 1 convolutions, which is cheap
)
"""Regular expressions for the beginnings of suppressed warnings."""


def silence_libraries(on_import: bool = False) -> None:
    """Suppress the messages of :data:`LOGGED` and :data:`WARNED`, or of ``ON_IMPORT``, for the rest of the process.

    What is logged without a handler goes to the terminal, which names of files in it cannot steer from then on.
    """
    if logging.lastResort is not None:
        logging.lastResort.addFilter(escape_message)
    for name in ON_IMPORT if on_import else LOGGED:
        logging.getLogger(name).addFilter(is_shown)
    for start in () if on_import else WARNED:
        warnings.filterwarnings("ignore", message=start)


def escape_message(record: logging.LogRecord) -> bool:
    """Make a log message :func:`~latentreward.core.errors.printable`; a filter that lets every message through."""
    with suppress(Exception):  # of a call whose arguments do not fit its text: logging prints it and goes on
        record.msg, record.args = printable(record.getMessage()), ()
    return True


def is_shown(record: logging.LogRecord) -> bool:
    """Tell whether a log message is shown: it contains none of its logger's texts. A logging filter."""
    with suppress(Exception):  # as above
        return not any(text in record.getMessage() for text in {**ON_IMPORT, **LOGGED}[record.name])
    return True
