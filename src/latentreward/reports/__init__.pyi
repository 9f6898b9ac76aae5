from .drawing import clip_uri, figure_uri, picture_uri
from .page import render_page, write_page

__all__ = [
    "clip_uri",
    "figure_uri",
    "picture_uri",
    "render_page",
    "write_page",
]
