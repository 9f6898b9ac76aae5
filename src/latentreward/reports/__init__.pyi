from .page import render_page, write_page
from .pictures import clip_uri, figure_uri, picture_uri

__all__ = [
    "clip_uri",
    "figure_uri",
    "picture_uri",
    "render_page",
    "write_page",
]
