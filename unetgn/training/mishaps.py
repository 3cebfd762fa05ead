"""Keeps what fails beside the training from ending it: a picture, a tracker, a row that waits to be written."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from unetgn.training.errors import Diverged, Failed, one_line

logger = logging.getLogger("unetgn.training")


class Mishaps:
    """Counts what failed; each cause is warned of once, and summed up at the end."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def beside(self, what: str) -> Iterator[None]:
        """Do something that the run can do without; `what` names it."""
        try:
            yield
        except (Diverged, Failed):  # what another rank noted, which a question in the block brought
            raise
        except Exception as error:
            cause = what, re.sub(r"\d+", "#", one_line(error))  # steps and addresses make no other cause
            self.counts[cause] += 1
            if self.counts[cause] == 1:
                logger.warning("%s failed: %s; the run goes on without, and says so once", what, one_line(error))

    def sum_up(self) -> None:
        """Warn of how often each cause came up, where it was more than once."""
        for (what, cause), count in self.counts.items():
            if count > 1:
                logger.warning("%s failed %d times: %s", what, count, cause)
