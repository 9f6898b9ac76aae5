"""What ``latentreward serve`` tells of the reward that scores a schema's requests."""

from collections.abc import Mapping
from threading import Event
from typing import Any

from latentreward.errors import InputError
from latentreward.remote.schemas import Schema, shown
from latentreward.remote.server import Connection


def describe(connection: Connection, schema: Schema, ended: Event | None = None) -> Mapping[str, Any]:
    """Ask ``latentreward serve`` for the description of a reward.

    The description lies beside the path of the schema: ``/rewards/NAME/v1/score`` of a reward by name has the
    description ``/rewards/NAME/v1/model``.

    Raises:
        RemoteError: If the server gives none.
    """
    path = f"{schema.path.rpartition('/')[0]}/model"
    told = connection.ask("GET", path, ended=ended)
    if not isinstance(told, dict) or not (isinstance(told.get("latent_space"), dict) and "model" in told):
        kind = type(schema).__name__
        connection.refuse(f"{path} answers {shown(told)}; schema: {kind} is for latentreward serve")
    return told


def check_rows(connection: Connection, model: Mapping[str, Any], batch_size: int) -> None:
    """Raise InputError if ``batch_size`` is over the server's limit in the description ``model``."""
    most = model.get("max_rows")
    if isinstance(most, int) and batch_size > most:
        raise InputError(
            f"reward.batch_size={batch_size} is over {most}, the most rows that the reward server "
            f"{connection.server.url} takes in a request"
        )
