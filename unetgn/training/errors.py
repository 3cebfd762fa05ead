"""Names the errors that end a run, so that every part can raise them and train.py can tell what to say.

Refused, before anything is written: ConfigError, RunDirectoryError, CheckpointError (train.py exits with 2).
Ended on the way: Failed and Preempted, with the last whole step saved, Diverged, with what was saved before as it was
(train.py exits with 1). DataError is what reading data raises.
"""

from __future__ import annotations

from collections.abc import Sequence

from unetgn.messages import SAID, plain


class ConfigError(ValueError):
    """Says that a configuration cannot be run; the message names the source, the key and what would be right."""


class Misfit(ValueError):
    """Says what of the data does not fit the configuration, and the keys with which it would: `Misfit(words, keys)`."""

    @property
    def keys(self) -> dict[str, object]:
        """Holds the keys and the values that they should have; none where no key would do."""
        return dict(self.args[1])

    @property
    def parts(self) -> list[Misfit]:
        """Holds the misfits that this one was made of."""
        return list(self.args[2]) if len(self.args) > 2 else [self]

    def __str__(self) -> str:
        return str(self.args[0])


def all_at_once(misfits: Sequence[Misfit]) -> Misfit:
    """Make one error of several, with the keys of all."""
    parts = [part for misfit in misfits for part in misfit.parts]
    if len(parts) == 1:
        return parts[0]
    keys = {key: value for part in parts for key, value in part.keys.items()}
    line = " ".join(f"{key}={'null' if value is None else value}" for key, value in keys.items())
    listed = "; ".join(f"({number}) {misfit}" for number, misfit in enumerate(parts, 1))
    return Misfit(f"the data do not fit the configuration: {listed}. All at once: {line}", keys, parts)


class RunDirectoryError(Exception):
    """Says that the folder belongs to another run, or that another process is at work in it."""


class CheckpointError(Exception):
    """Says that a checkpoint is missing, incomplete or damaged; the message names it and what is wrong."""


class CheckpointFormatError(CheckpointError):
    """Says that another version of unetgn wrote a checkpoint; it is sound, so that nothing may pass it over."""


class DataError(Exception):
    """Says that the data turned out to be unfit while they were read."""


class Diverged(Exception):
    """Says that the loss or the gradient is not finite."""


class Failed(Exception):
    """Says what ended a run that was sound, on whichever rank; every rank raises it at the same question."""


class Preempted(Exception):
    """Says that a signal asked the run to stop; its state is saved."""


def one_line(error: BaseException) -> str:
    """Say in a line what an error says: its kind, where that is not said already, and its first line.

    Of an error that comes out of a loader's worker with a traceback in its text, the last line.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught "):
        return lines[-1]
    if isinstance(error, (DataError, Diverged, Failed)):
        return lines[0]
    return ": ".join([type(error).__name__, *lines[:1]])


def reason(error: BaseException) -> str:
    """Return what the innermost of a chain of errors says, in one line: libraries add stacks of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = plain(" ".join(str(error).split()), most=SAID)
    return f"{type(error).__name__}: {said}"
