"""The scoring service behind the HTTP endpoints: one or several rewards, and what they share."""

from collections.abc import Sequence

from fastapi import Request

from latentreward.errors import InputError
from latentreward.serving.errors import RequestError
from latentreward.serving.resources import Resources
from latentreward.serving.served import ServedModel


class ScoringService:
    """Rewards of a server by name; the first one scores requests that name none.

    Args:
        models: At least one reward.
        resources: What the rewards share.

    Raises:
        InputError: If there is no reward, or two have the same name.
    """

    def __init__(self, models: Sequence[ServedModel], resources: Resources) -> None:
        self.resources = resources
        self.models = {model.name: model for model in models}
        if not models or len(self.models) < len(models):
            raise InputError(
                f"{len(models)} rewards with {len(self.models)} names; give at least one, each its own name"
            )
        self.settings = resources.settings
        resources.metrics.queue_rows.set_function(lambda: sum(model.batcher.waiting for model in models))

    @property
    def default(self) -> ServedModel:
        """Reward of requests that name none."""
        return next(iter(self.models.values()))

    @property
    def ready(self) -> bool:
        """Whether all rewards are ready."""
        return all(model.ready for model in self.models.values())

    def model_of(self, request: Request) -> ServedModel:
        """Return the reward that the address of a request names by ``/rewards/NAME/…``; else the first one.

        Raises:
            RequestError: With status 404 if there is no such reward.
        """
        return self.named(request.path_params.get("reward", self.default.name), 404)

    def named(self, name: str, status: int = 400) -> ServedModel:
        """Return the reward of a name.

        Raises:
            RequestError: With ``status`` if there is no such reward.
        """
        if name not in self.models:
            known = ", ".join(self.models)[:200]
            raise RequestError(f"no reward {name[:40]!r} is served here; this server has {known}", status)
        return self.models[name]
