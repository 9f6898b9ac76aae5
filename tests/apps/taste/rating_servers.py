"""The server of the page to rate, in a thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentreward.apps.serving.settings import bind
from latentreward.apps.taste.rating_page import HOST, RatingServer
from latentreward.apps.taste.ratings import Ratings


@contextmanager
def rating_server(folder: Path) -> Iterator[RatingServer]:
    """Serve the page for a folder inside the block, at a free port."""
    with RatingServer(Ratings(folder), bind(HOST, 0)) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield made
        finally:
            made.shutdown()
            thread.join()
