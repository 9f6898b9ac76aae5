"""Clips are decoded by the times of their frames, and bad files give one clear line."""

import random
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image

from latentreward.core.contracts import ImageRef
from latentreward.core.errors import InputError
from latentreward.core.reports.drawing import animate
from latentreward.data import ImageError, JSONLPairReader, PreferenceDataModule
from latentreward.data.clips import ClipLoader
from latentreward.data.images import CLIP, DAMAGED, EMPTY, SHORT, TOO_LARGE, UNKNOWN, read_header
from tests.clips import write_clip

REDS = [0, 20, 40, 60, 80, 100, 120, 140, 160, 180]


def ref(path: Path) -> ImageRef:
    return ImageRef(path.name, path=path)


def reds(pixels: torch.Tensor) -> list[int]:
    """The red of each frame, to the nearest 20 levels, and nothing of the other colours."""
    levels = ((pixels + 1) * 127.5).mean(dim=(2, 3))
    assert levels[1:].max() < 10
    return [round(level / 20) * 20 for level in levels[0].tolist()]


@pytest.mark.parametrize(
    ("fps", "taken"), [(16, [0, 20, 40, 60, 80]), (8, [0, 40, 80, 120, 160]), (32, [0, 0, 20, 20, 40])]
)
def test_frames_are_those_shown_at_their_times(fps: float, taken: list[int], tmp_path: Path) -> None:
    clip = ClipLoader(16, 24, frames=5, fps=fps).load(ref(write_clip(tmp_path / "a.mp4", REDS)))
    assert clip.pixels.shape == (3, 5, 16, 24) and clip.pixels.dtype == torch.float32
    assert reds(clip.pixels) == taken
    assert clip.size == (32, 32)
    assert clip.unused == {16: 5, 8: 0, 32: 15}[fps]


def test_variable_frame_rate(tmp_path: Path) -> None:
    times = [0, 62, 63, 180, 190, 200, 210, 400, 500, 600]
    path = write_clip(tmp_path / "a.mp4", REDS, times)
    assert reds(ClipLoader(16, 16, frames=9, fps=16)(ref(path))) == [0, 20, 40, 60, 120, 120, 120, 140, 160]


def test_rounded_times_are_not_late(tmp_path: Path) -> None:
    """At 16 per second a clock of milliseconds rounds times up to half a millisecond."""
    path = write_clip(
        tmp_path / "a.mp4", REDS, [round(number * 62.5 + 0.01) for number in range(10)], video_track_timescale="1000"
    )
    assert reds(ClipLoader(16, 16, frames=9, fps=16)(ref(path))) == REDS[:9]


def test_bytes_and_blank(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", REDS)
    loader = ClipLoader(16, 16, "center_crop", frames=5)
    from_bytes = loader(ImageRef("a", data=path.read_bytes()))
    assert torch.equal(from_bytes, loader(ref(path)))
    assert torch.equal(loader.blank(), torch.zeros(3, 5, 16, 16))


def test_animated_webp(tmp_path: Path) -> None:
    """Milliseconds round the times of 16 frames per second."""
    frames = [Image.new("RGB", (32, 32), (red, 0, 0)) for red in REDS]
    (tmp_path / "a.webp").write_bytes(animate(frames, lossless=True))
    loader = ClipLoader(16, 16, frames=9, fps=16)
    assert reds(loader(ref(tmp_path / "a.webp"))) == REDS[:9]
    (tmp_path / "b.webp").write_bytes((tmp_path / "a.webp").read_bytes()[:300])
    with pytest.raises(ImageError, match=r"image 'b\.webp': truncated or damaged image"):
        loader(ref(tmp_path / "b.webp"))


def broken(folder: Path) -> dict[str, tuple[Path, str, str]]:
    """Files that hold no clip of five frames, with the problem and a part of the message."""
    whole = write_clip(folder / "whole.mp4", REDS).read_bytes()
    early = write_clip(folder / "early.mp4", REDS, movflags="faststart").read_bytes()
    files = {
        "truncated": (whole[: len(whole) // 2], DAMAGED, "no video track, or cut off"),
        "truncated_at_end": (early[: early.find(b"mdat") + 100], DAMAGED, "damaged"),
        "empty": (b"", EMPTY, "0 bytes"),
        "short": (write_clip(folder / "two.mp4", REDS[:2]).read_bytes(), SHORT, "2 of frames=5 at fps=16"),
        "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), UNKNOWN, "no whole mp4"),
        "playlist": (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{folder}/whole.mp4\n#EXT-X-ENDLIST\n".encode(),
            UNKNOWN,
            "no whole mp4",
        ),
        "concat": (f"ffconcat version 1.0\nfile '{folder}/whole.mp4'\n".encode(), UNKNOWN, "no whole mp4"),
    }
    for name, (content, _, _) in files.items():
        (folder / f"{name}.mp4").write_bytes(content)
    return {name: (folder / f"{name}.mp4", problem, told) for name, (_, problem, told) in files.items()}


def test_bad_files(tmp_path: Path) -> None:
    for name, (path, problem, told) in broken(tmp_path).items():
        with pytest.raises(ImageError) as caught:
            ClipLoader(16, 16, frames=5)(ref(path))
        message = str(caught.value)
        assert caught.value.problem == problem, (name, message)
        assert f"{name}.mp4" in message and told in message and "\n" not in message


def test_damage_anywhere_is_the_files_fault(tmp_path: Path) -> None:
    """Whatever FFmpeg raises, the row can be left out; header and sample tables are the richest in cases."""
    raw = write_clip(tmp_path / "a.mp4", REDS).read_bytes()
    loader, tables, found = ClipLoader(16, 16, frames=5), raw.index(b"moov"), set()
    damaged = [raw.replace(b"stsd", b"zzzz")]
    for seed in range(60):
        rng, copy = random.Random(seed), bytearray(raw)
        for _ in range(8):
            copy[rng.randrange(tables if seed % 2 else 0, len(copy))] = rng.randrange(256)
        damaged.append(bytes(copy))
    for data in damaged:
        try:
            loader(ImageRef("k", data=data))
        except ImageError as error:
            found.add(error.problem)
    assert {DAMAGED, UNKNOWN} <= found
    with pytest.raises(ImageError, match="its video track does not name a codec"):
        loader(ImageRef("k", data=damaged[0]))


def test_names_are_no_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg would take the name for a list of files to join."""
    monkeypatch.chdir(tmp_path)
    write_clip(Path("a.mp4"), REDS)
    with pytest.raises(ImageError, match="missing file"):
        ClipLoader(16, 16, frames=5)(ImageRef("x", path=Path("concat:a.mp4")))


def refer(clip: bytes, path: str) -> bytes:
    """Replace the clip's reference to its own data by an alias of another file."""
    name = path.encode() + bytes(len(path) % 2)
    body = bytes(130) + struct.pack(">HH", 1, 1) + bytes(16)
    body += struct.pack(">HH", 2, len(name)) + name + struct.pack(">HH", 0xFFFF, 0)
    alias = struct.pack(">I", 12 + len(body)) + b"alis" + bytes(4) + body
    at = clip.index(b"url \0\0\0\1") - 4
    made = bytearray(clip[:at] + alias + clip[at + 12 :])
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = made.rindex(box, 0, at) - 4
        (size,) = struct.unpack_from(">I", made, place)
        struct.pack_into(">I", made, place, size + len(alias) - 12)
    return bytes(made)


def test_files_that_a_clip_refers_to_are_not_read(tmp_path: Path) -> None:
    import av

    write_clip(tmp_path / "other.mp4", [200] * 6)
    path = tmp_path / "evil.mp4"
    path.write_bytes(refer(write_clip(tmp_path / "own.mp4", [0] * 6).read_bytes(), "/x/other.mp4"))
    with av.open(str(path), options={"enable_drefs": "1"}) as followed:
        assert next(followed.decode(video=0)).to_ndarray(format="rgb24")[0, 0, 0] > 150
    with pytest.raises(ImageError, match="the file ends after 0 of its 6 frames"):
        ClipLoader(16, 16, frames=5)(ref(path))


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "a.mp4", REDS)
    with pytest.raises(ImageError, match="32×32 exceeds max_pixels=1000") as caught:
        ClipLoader(16, 16, max_pixels=1000, frames=5)(ref(path))
    assert caught.value.problem == TOO_LARGE
    monkeypatch.setattr("latentreward.data.clips.MAX_DECODED", 4)
    with pytest.raises(ImageError, match="more than 4 frames"):
        ClipLoader(16, 16, frames=5)(ref(path))
    monkeypatch.setattr("latentreward.data.clips.MAX_DECODED", 100)
    monkeypatch.setattr("latentreward.data.clips.MAX_DECODED_PIXELS", 4 * 32 * 32)
    with pytest.raises(ImageError, match=r"more than 4096 pixels; give smaller frames"):
        ClipLoader(16, 16, frames=5)(ref(path))


def pairs(folder: Path, count: int = 4) -> str:
    """Write pairs of clips, the reddest chosen, and the lines that name them."""
    lines = []
    for number in range(count):
        for name, low in (("good", 150), ("bad", 0)):
            write_clip(folder / f"{name}{number}.mp4", [low + 10 * frame + number for frame in range(7)])
        lines.append(f'{{"prompt": "clip {number}", "chosen": "good{number}.mp4", "rejected": "bad{number}.mp4"}}\n')
    (folder / "pairs.jsonl").write_text("".join(lines))
    return str(folder / "pairs.jsonl")


def test_pairs_of_clips(tmp_path: Path) -> None:
    data = PreferenceDataModule(16, train=JSONLPairReader(pairs(tmp_path)), frames=5, batch_size=4, num_workers=2)
    (batch,) = data.train_dataloader()
    assert batch.chosen.shape == batch.rejected.shape == (4, 3, 5, 16, 16)
    assert (batch.chosen[:, 0].mean(dim=(1, 2, 3)) > batch.rejected[:, 0].mean(dim=(1, 2, 3))).all()
    assert str(data.datasets["train"].image_sizes) == "16x16, clips of 5 frames at 16 per second"


@pytest.mark.timeout(120)
def test_workers_read_clips_after_their_parent(tmp_path: Path) -> None:
    """What PyAV keeps of a clip that was read before a fork must not stop the workers."""
    reader = JSONLPairReader(pairs(tmp_path))
    ClipLoader(16, 16, frames=5).load(ref(tmp_path / "good0.mp4"))
    data = PreferenceDataModule(16, train=reader, frames=5, batch_size=4, num_workers=1)
    (batch,) = data.train_dataloader()
    assert len(batch) == 4


def test_a_broken_clip_is_skipped_or_named(tmp_path: Path) -> None:
    file = pairs(tmp_path)
    (tmp_path / "bad1.mp4").write_bytes(b"")
    data = PreferenceDataModule(16, train=JSONLPairReader(file), frames=5, num_workers=0)
    with pytest.raises(
        ImageError, match=r"data.train: pairs.jsonl:2: image 'bad1.mp4': empty image .*; replace the file"
    ):
        list(data.train_dataloader())
    data = PreferenceDataModule(16, train=JSONLPairReader(file, on_error="skip"), frames=5, num_workers=0)
    (batch,) = data.train_dataloader()
    assert len(batch) == 3


def test_readers_of_images_name_clips(tmp_path: Path) -> None:
    raw = write_clip(tmp_path / "a.mp4", REDS).read_bytes()
    for image in (ref(tmp_path / "a.mp4"), ImageRef("a", data=raw)):
        with pytest.raises(ImageError, match="clip, not an image") as caught:
            read_header(image)
        assert caught.value.problem == CLIP
    with pytest.raises(ImageError, match="unknown image format"):
        read_header(ImageRef("a", data=raw[:8] + b"heic" + raw[12:]))


def test_clips_alone_need_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    PreferenceDataModule(16)
    with pytest.raises(InputError, match=r"clips need PyAV; install latentreward\[video\]"):
        PreferenceDataModule(16, frames=5)
