"""HTTP server that scores latents and images with reward models (extra ``serve``).

The way of a request: :mod:`~latentreward.apps.serving.app` checks its token and finds its route, or
:mod:`~latentreward.apps.serving.dialects` that of another framework; :mod:`~latentreward.apps.serving.bodies` reads
the body into rows; :mod:`~latentreward.apps.serving.service` waits for scores or the timeout, while
:mod:`~latentreward.apps.serving.batching` joins the rows of several requests in one pass of the reward.
"""
