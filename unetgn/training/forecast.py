"""Says early in a run how long it will take: to its first samples and to its end."""

from __future__ import annotations

import time

from unetgn.training.config import RunConfig

SECONDS = 10.0  # that are measured at least, the first step, in which all is begun, left out
STEPS = 3  # and so many, but one is enough where steps take STEPS · SECONDS
LONG = 24 * 3600.0  # a run that is said to be long
SMALL = 32  # pixels of my_images32


class Forecast:
    """Measures the first steps of a run, and says once what they tell of the rest.

    Steps alone are counted, no drawing, validation or saving.
    """

    def __init__(self, config: RunConfig, step: int, *, on_cpu: bool) -> None:
        self.config, self.on_cpu = config, on_cpu
        self.step, self.steps, self.seconds, self.said = step, -1, 0.0, False
        self.began = time.perf_counter()

    def begin_step(self) -> None:
        """Note when a step begins."""
        self.began = time.perf_counter()

    def end_step(self) -> str:
        """Note that the step has been made; return what is to be said now, which comes once at the most."""
        self.step += 1
        self.steps += 1
        if self.said or not self.steps:
            return ""
        self.seconds += time.perf_counter() - self.began
        enough = (self.seconds >= SECONDS and self.steps >= STEPS) or self.seconds >= STEPS * SECONDS
        if not enough or self.step >= self.config.train.steps:
            return ""
        self.said = True
        return self.describe(self.seconds / self.steps)

    def describe(self, seconds: float) -> str:
        """Return the sentence for steps of `seconds`."""
        config, left = self.config, self.config.train.steps - self.step
        said = [f"a step takes {seconds:.2g} s"]
        if (drawn := config.preview.next_step(self.step)) is not None:
            drawn = min(drawn, config.train.steps)
            said.append(f"the next samples (step {drawn}) are {in_words((drawn - self.step) * seconds)} away")
        said.append(f"the last step ({config.train.steps}) {in_words(left * seconds)}")
        advice = ""
        if self.on_cpu and config.data.name == "folder" and left * seconds > LONG and max(config.data.size) > SMALL:
            advice = "; on a CPU a smaller network and smaller images are quicker by far: --config my_images32"
        return ", ".join(said) + advice


def in_words(seconds: float) -> str:
    """Say a time in the unit that fits it: 40 s, 12 min, 3.5 h, 2.1 days."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            amount = seconds / size
            return f"{amount:.0f} {unit}" if amount >= 10 or unit == "min" else f"{amount:.1f} {unit}"
    return f"{seconds:.0f} s"
