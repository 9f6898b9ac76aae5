"""Write preference pairs of emoji: ``python -m tools.emoji.pairs FOLDER``.

The environment variable EMOJI_PATH names the unpacked npm package. Labels of ``train`` are noisy, those of ``test``,
whose emoji are in no training, are the oracle's; ``oracle.parquet`` has the utility and its parts for all.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from latentreward.core.errors import InputError
from latentreward.tinyworld.pairs import Mixed
from latentreward.tinyworld.writers import write_hpdv3, write_pickapic
from tools.emoji.world import EmojiWorld


def main(args: Sequence[str] | None = None) -> None:
    """Run the command with ``args``; None takes the arguments of the process."""
    parser = argparse.ArgumentParser(prog="python -m tools.emoji.pairs", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=("pickapic", "hpdv3"), default="pickapic", help="hpdv3 has no ties")
    parser.add_argument("--train", type=int, default=6000, help="number of training pairs")
    parser.add_argument("--test", type=int, default=3000, help="number of held-out pairs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training pairs; the held-out ones stay")
    parser.add_argument(
        "--mixed", action="store_true", help="training pairs alone, whose winners are often worse in one part"
    )
    options = parser.parse_args(args)
    if options.mixed and options.layout != "pickapic":
        parser.error(f"--mixed is written in the layout of Pick-a-Pic alone; leave out --layout {options.layout}")
    numbers = {"train": options.train} | ({} if options.mixed else {"test": options.test})
    seeds = {"train": options.seed, "test": 0}
    try:
        if options.layout == "hpdv3":
            write_hpdv3(options.folder, numbers, seeds, EmojiWorld())
        else:
            write_pickapic(options.folder, numbers, seeds, Mixed() if options.mixed else None, EmojiWorld())
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
