"""A folder of the shape of the npm package, with drawn pictures."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from tools.emoji.world import VARIABLE, EmojiWorld

COLOURS = ("red", "orange", "gold", "green", "teal", "blue", "purple", "brown", "gray", "black")
TONES = ("1F3FB", "1F3FF")


def picture(colour: str, round_: bool, number: int = 0) -> Image.Image:
    image = Image.new("RGBA", (64, 64))
    draw = ImageDraw.Draw(image)
    (draw.ellipse if round_ else draw.rectangle)((8, 8, 56, 56), fill=colour)
    draw.rectangle((28, 28, 30 + number, 36), fill="white")
    return image


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories of 20 emoji; a woman and a man of two tones, a flag of equal pixels, a small category."""
    root = tmp_path_factory.mktemp("emoji")
    (root / "img/google/64").mkdir(parents=True)
    entries: list[dict[str, Any]] = []

    def add(category: str, name: str, code: str, image: Image.Image) -> dict[str, Any]:
        entry = {"name": name, "category": category, "unified": code, "image": f"{code.lower()}.png"}
        image.save(root / "img/google/64" / entry["image"])
        return entry

    for place, colour in enumerate(2 * COLOURS):
        big = "BIG" if place >= len(COLOURS) else "SMALL"
        for category, round_ in (("Smileys & Emotion", True), ("Flags", False)):
            code = f"{0x1F600 + 2 * place + round_:X}"
            entries.append(
                add(category, f"{big} {colour} ({'face' if round_ else 'Flag'})", code, picture(colour, round_, place))
            )
    for number, person in enumerate(("1F468", "1F469"), start=30):
        entry = add("Smileys & Emotion", "GENIE DE L’ÎLE", f"{person}-200D-1F52C", picture("pink", True, number))
        codes = {tone: f"{person}-{tone}-200D-1F52C" for tone in TONES}
        tones = {tone: add("", "", code, picture("tan", True, number - 20)) for tone, code in codes.items()}
        entries.append(entry | {"skin_variations": tones})
    entries.append(add("Flags", "another red flag", "1F6F0", picture("red", False)))
    entries.append(add("Component", "swatch", "1F6F1", picture("tan", False)))
    (root / "emoji.json").write_text(json.dumps(entries))
    return root


@pytest.fixture(scope="session")
def world(folder: Path) -> EmojiWorld:
    return EmojiWorld(folder)


@pytest.fixture
def in_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(folder))
