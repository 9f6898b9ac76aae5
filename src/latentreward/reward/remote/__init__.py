"""Scores from servers of others: connection, forms of requests and replies, batches and cache."""

from latentreward.remote.schemas import ImageSchema, PlainJSON, Schema, ServedImages, ServedLatents, UniRL
from latentreward.remote.server import RemoteError, RemoteServer

__all__ = [
    "ImageSchema",
    "PlainJSON",
    "RemoteError",
    "RemoteServer",
    "Schema",
    "ServedImages",
    "ServedLatents",
    "UniRL",
]
