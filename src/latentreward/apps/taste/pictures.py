"""Pictures of a folder of one's own: those that can be read, each content once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentreward.core.contracts import like_prompt, sources_of
from latentreward.core.errors import InputError
from latentreward.core.storage.digests import digest
from latentreward.core.storage.json_files import UnreadableTextError
from latentreward.data import ImageError, decode_image
from latentreward.data.image_lists import ListedImage, read_images
from latentreward.data.images import file_image, image_bytes
from latentreward.data.readers.base import MAX_PROMPT_CHARS
from latentreward.data.readers.folders import find_pictures, read_caption
from latentreward.data.readers.json_rows import parse_text

MOST_NAMED = 3  # files that a remark names; the rest are counted


@dataclass(frozen=True)
class Picture:
    """Picture that can be read."""

    path: str  # path relative to the folder, with ``/``
    content: str  # digest of the file's bytes; two files with the same bytes are the same picture
    caption: str  # text of the ``.txt`` file of the same name, or prompt in the table; empty without one


def check_folder(folder: Path) -> None:
    """Raise InputError if there is no such folder."""
    if not folder.is_dir():
        raise InputError(f"folder: {folder} is not a folder; give the folder of your pictures")


def read_pictures(folder: Path, below: str = "") -> tuple[dict[str, Picture], list[str]]:
    """Find and decode all pictures of the subfolder ``below`` and its own, in the order of their names.

    Paths are relative to ``folder``. Pictures outside it, behind links, are not opened. Hidden files and folders are
    left out. Orientations by EXIF are applied later, as in training. In a folder that ``latentreward generate`` wrote,
    pictures and captions are those of its table; a caption of an edit carries the pictures that were edited.

    Returns:
        Name, which is the path below ``below`` without its ending → picture; and one line about each kind of file that
        was left out.
    """
    found: dict[str, Picture] = {}
    if not below and (rows := generated_rows(folder)):
        return _generated(folder, rows)
    images, unread = find_pictures(folder / below)
    unreadable, twice, uncaptioned = [], [], dict[str, list[str]]()
    for name, files in images.items():
        for number, file in enumerate(files):
            path = Path(file).relative_to(folder.name).as_posix() if not below else file
            if (told := parse_text(path)) != path:  # no file of pairs could name it
                unreadable.append(f"{told} (its name is not UTF-8)")
                continue
            reference = file_image(folder, path)
            try:
                decode_image(reference)
            except ImageError as error:
                unreadable.append(f"{path} ({error.problem})")
                continue
            if number and name in found:
                twice.append(path)
                continue
            assert reference.path is not None
            caption, problem = caption_of(reference.path, folder)
            if problem:
                uncaptioned.setdefault(problem, []).append(path)
            found[name] = Picture(path, digest([reference.path.read_bytes()]), caption)
    remarks = [f"{below}/: {remark}" if below else remark for remark in unread]
    remarks += [f"left out, cannot be read: {listed(unreadable)}"] if unreadable else []
    if twice:
        remarks.append(f"left out, another picture has the same name with another ending: {listed(twice)}")
    remarks += [f"no caption, since it {problem}: {listed(paths)}" for problem, paths in uncaptioned.items()]
    return found, remarks


def generated_rows(folder: Path) -> Sequence[ListedImage]:
    """Return the results in the table of a folder that ``latentreward generate`` wrote; none for other folders."""
    return read_images(str(folder)).rows if (folder / "generate.json").is_file() else ()


def _generated(folder: Path, rows: Sequence[ListedImage]) -> tuple[dict[str, Picture], list[str]]:
    found, unreadable = {}, []
    for row in rows:
        images = [file_image(folder, row.name), *sources_of(row.prompt)]
        try:
            for image in images:
                decode_image(image)
        except ImageError as error:
            unreadable.append(f"{row.name} ({error.problem})")
            continue
        caption = like_prompt(" ".join(row.prompt.split()), row.prompt)
        found[row.name] = Picture(row.name, digest([image_bytes(images[0])]), caption)
    return found, [f"left out, cannot be read: {listed(unreadable)}"] if unreadable else []


def caption_of(picture: Path, folder: Path) -> tuple[str, str]:
    """Read the ``.txt`` file beside a picture.

    Returns:
        Caption, empty without such a file; and what is wrong with one that is left out, or an empty text.
    """
    try:
        caption = " ".join((read_caption(picture.with_suffix(".txt"), folder) or "").split())
    except UnreadableTextError as error:
        return "", f"is {error.problem.partition(' at byte ')[0]}"
    if len(caption) > MAX_PROMPT_CHARS:  # the readers of later steps would refuse it
        return "", f"has more than {MAX_PROMPT_CHARS} characters"
    return caption, ""


def same_contents(pictures: Iterable[Picture]) -> list[str]:
    """List groups of files with the same bytes, as ``one.jpg = other.jpg``."""
    groups: dict[str, list[str]] = {}
    for picture in pictures:
        groups.setdefault(picture.content, []).append(picture.path)
    return [first_of(paths, " = ") for paths in groups.values() if len(paths) > 1]


def listed(names: list[str]) -> str:
    """Count some files, and name the first of them."""
    return f"{len(names)}: {first_of(names, ', ')}"


def first_of(names: list[str], joint: str) -> str:
    """Name the first of some files, joined by ``joint``, and count the others."""
    more = len(names) - MOST_NAMED
    return joint.join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def number_of(number: int, noun: str) -> str:
    """Return a number with its noun, such as ``no pictures``, ``1 picture`` or ``2 pictures``."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
