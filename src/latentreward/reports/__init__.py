"""Pages to look at: one HTML file each, with everything in it and nothing fetched."""

from latentreward.reports.page import render_page, write_page
from latentreward.reports.pictures import figure_uri, picture_uri

__all__ = ["figure_uri", "picture_uri", "render_page", "write_page"]
