"""HTML page of ``latentreward score``: thumbnails sorted by score."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import pyarrow as pa

from latentreward.core.contracts import ImageRef, sources_of
from latentreward.core.errors import InputError
from latentreward.core.reports.drawing import clip_uri, picture_uri, to_images
from latentreward.core.reports.page import write_page
from latentreward.core.storage.durable import check_writable
from latentreward.data import ImageError, decode_image
from latentreward.data.clips import ClipLoader
from latentreward.data.image_lists import ImageList, ListedImage
from latentreward.data.image_sizes import ImageSizes
from latentreward.data.images import ExifOrientation
from latentreward.reward.scoring.network import name_of

SIDE, QUALITY = 224, 75
"""Longest side of a thumbnail in pixels, and its JPEG quality: 500 photographs make a page of 4 to 8 MB."""
LISTED = 1000  # largest number of images without a score that the page lists
LEVEL = "score_"  # prefix of the columns with scores at one noise level


class Gallery:
    """HTML file that shows scored images as embedded thumbnails, each with a link to its image file.

    Beside an edit the pictures that were edited are shown.

    Of a list longer than ``limit`` the best and the worst are shown, half each. An image of more than ``max_pixels`` is
    shown without a thumbnail.
    """

    def __init__(self, path: Path, limit: int, threads: int, max_pixels: int) -> None:
        if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
            raise InputError(f"gallery is {path}; give a file that ends in .html")
        check_writable(path)
        self.path, self.limit, self.threads, self.max_pixels = path, limit, threads, max_pixels

    def write(
        self,
        listed: ImageList,
        table: pa.Table,
        model: str,
        exif: ExifOrientation = "ignore",
        sizes: ImageSizes | None = None,
    ) -> int:
        """Write the page and return the number of images on it.

        ``table`` has the scores of the images, from :class:`~latentreward.reward.scoring.image_lists.ListedScoring`.
        Their thumbnails are turned upright if ``exif`` is ``apply``; a rule ``sizes`` for clips makes thumbnails that
        play.
        """
        scores = table["score"].to_numpy()
        order = np.argsort(-scores, kind="stable")[: int(np.isfinite(scores).sum())].tolist()
        best = len(order) if len(order) <= self.limit else (self.limit + 1) // 2
        places = [*range(best), *range(max(best, len(order) - self.limit + best), len(order))]
        rows = table.to_pylist()
        with ThreadPoolExecutor(self.threads) as pool:
            shown = [listed.rows[order[place]] for place in places]
            pictures = pool.map(lambda row: self._picture(row.ref(), exif, sizes), shown)
            sources = pool.map(lambda row: [self._picture(one, exif) for one in sources_of(row.prompt)], shown)
            cards = [
                self._card(row, rows[order[place]], place + 1, picture) | {"sources": before}
                for place, row, picture, before in zip(places, shown, pictures, sources, strict=True)
            ]
        told = ((one.name, row["problem"]) for one, row in zip(listed.rows, rows, strict=True))
        without = [(name, problem) for name, problem in told if problem is not None]
        write_page(
            self.path,
            "gallery",
            title=f"Scores of {name_of(str(listed.source))}",
            model=name_of(model),
            total=len(listed.rows),
            scored=len(order),
            mean=f"{np.nanmean(scores):.4f}" if order else "",
            best=best,
            cards=cards,
            without=without[:LISTED],
            more_without=max(len(without) - LISTED, 0),
        )
        return len(places)

    def _card(self, row: ListedImage, values: dict[str, Any], rank: int, picture: str | None) -> dict[str, Any]:
        levels = {name.removeprefix(LEVEL): value for name, value in values.items() if name.startswith(LEVEL)}
        return {
            **{name: values[name] for name in ("score", "z_score", "quantile")},
            "rank": rank,
            "name": row.name,
            "prompt": row.prompt,
            "href": quote_from_bytes(os.fsencode(os.path.relpath(row.path, self.path.parent))),
            "picture": picture,
            "levels": [(name.replace("_", " "), value) for name, value in levels.items() if value is not None],
            "size": f"{values['width']} × {values['height']}",
        }

    def _picture(self, image: ImageRef, exif: ExifOrientation, sizes: ImageSizes | None = None) -> str | None:
        """Return a thumbnail as a data URI; None if the image or clip cannot be read any more."""
        loader = None if sizes is None else sizes.loader(SIDE, SIDE)
        try:
            if isinstance(loader, ClipLoader):
                clip = replace(loader, max_pixels=self.max_pixels)(image)
                return clip_uri(to_images(clip), loader.fps, SIDE, QUALITY)
            return picture_uri(decode_image(image, self.max_pixels, exif), SIDE, QUALITY)
        except ImageError:
            return None
