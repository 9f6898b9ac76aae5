"""Messages of libraries that tell a user of this program nothing; whatever is not named here is shown."""

import logging
import warnings

LOGGED = {
    "lightning.pytorch.utilities.rank_zero": (
        "Tip:",  # advertises Lightning's services
        "Detected KeyboardInterrupt",  # our own line says what is kept
        "TPU available: False",  # the line about GPUs above it names the device in use
        "Restored all states from the checkpoint",  # the line "Restoring states" above it names the file
    ),
    "lightning.fabric.utilities.seed": ("Seed set to",),  # config.yaml has seed_everything
    # An empty list: nothing has to be kept in float32.
    "diffusers.models.modeling_utils": ("should be kept in float32: [].",),
}
"""Logger -> texts of which a line has one."""

WARNED = (
    r".isinstance\(treespec, LeafSpec\). is deprecated",  # Lightning's own business with a newer torch
    r"Found \d+ module\(s\) in eval mode at the start of training",  # frozen networks and encoders are meant to be
    # Our data modules return an empty list where the data has no such split; an empty loader has another class's name.
    "Total length of `list` across ranks is zero",
    "Grad strides do not match bucket view strides",  # DDP copies gradients of 1 x 1 convolutions, which is cheap
)
"""Starts of warnings, as regular expressions."""


def silence_libraries() -> None:
    """Leave these messages out from now on."""
    for name in LOGGED:
        logging.getLogger(name).addFilter(is_shown)
    for start in WARNED:
        warnings.filterwarnings("ignore", message=start)


def is_shown(record: logging.LogRecord) -> bool:
    """Logging filter: whether none of the logger's texts is in the message."""
    return not any(text in record.getMessage() for text in LOGGED[record.name])
