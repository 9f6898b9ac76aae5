"""Reports: self-contained HTML pages, which load nothing from other files or the network, and Markdown and JSON."""

from latentreward.reports.page import render_page, write_page
from latentreward.reports.pictures import clip_uri, figure_uri, picture_uri

__all__ = ["clip_uri", "figure_uri", "picture_uri", "render_page", "write_page"]
