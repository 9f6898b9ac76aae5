"""Images with prompts as rows that a server scores."""

import json
from collections.abc import Sequence
from threading import Event
from typing import Any

from PIL import Image

from latentreward.core.contracts import identity_of
from latentreward.core.errors import InputError, one_line
from latentreward.core.storage.digests import digest
from latentreward.core.storage.json_files import shown
from latentreward.reward.remote.schemas import ImageSchema, png_text
from latentreward.reward.remote.scores import PendingScores, RemoteScores
from latentreward.reward.remote.server import RemoteServer

ImageRow = tuple[str, Image.Image]  # a prompt and an RGB image


class RemoteImages(RemoteScores[ImageRow]):
    """Scores of images from a server, ``batch_size`` of them in a request of the form ``schema``."""

    def __init__(self, server: RemoteServer, schema: ImageSchema, batch_size: int) -> None:
        super().__init__(server, batch_size)
        self.schema = schema

    def begin(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> PendingScores:
        """Ask for the scores of N RGB images, each for its prompt, and return before they are there."""
        rows = [*zip(prompts, images, strict=True)]
        keys = [
            digest([f"{identity_of(prompt)}\n{image.mode} {image.size}\n", image.tobytes()]) for prompt, image in rows
        ]
        return self.begin_rows(rows, keys)

    def ask(self, rows: Sequence[ImageRow], ended: Event) -> tuple[Sequence[Any], str | None]:
        prompts, images = zip(*rows, strict=True)
        request = self.schema.request(prompts, [png_text(image) for image in images])
        content, headers = json.dumps(request).encode(), {"content-type": "application/json"}
        reply = self.connection.ask("POST", self.schema.path, content, headers, ended)
        try:
            if not isinstance(reply, dict):
                raise InputError("the answer is no JSON object; look at the schema")
            return [*self.schema.scores(reply, request)], self.schema.model(reply)
        except InputError as error:
            self.connection.refuse(str(error), error)
        except Exception as error:  # of a schema of the user's; other ranks wait for scores or a refusal
            kind, told = type(self.schema).__name__, f"{type(error).__name__}: {one_line(error)}"
            self.connection.refuse(f"{kind} cannot read the answer {shown(reply)} ({shown(told)})", error)
