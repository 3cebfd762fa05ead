"""Shows how far a program has come: as a bar on a terminal, as plain lines in a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
LINE = "{n_fmt} of {total_fmt} {unit}s, {percentage:.0f}% [{elapsed}<{remaining}]{postfix}"


class Bar(tqdm):
    """Shows progress as tqdm does, but in a file as a line every half a minute, and one where something new is said."""

    disable: bool
    fp: TextIO

    def __init__(self, **options: Any) -> None:
        self.in_a_file = not _is_terminal(sys.stderr)
        in_a_file = {"mininterval": SECONDS_BETWEEN_LINES, "miniters": 1, "bar_format": LINE}
        super().__init__(**options, **(in_a_file if self.in_a_file else {"dynamic_ncols": True}))

    def close(self) -> None:
        """Show the bar as it was last; in a file without the empty line that tqdm ends with."""
        if self.in_a_file and not self.disable:
            self.display()
            self._decr_instances(self)
            self.disable = True
        super().close()

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar on a terminal; nothing where the bar is disabled."""
        if self.disable:
            return
        if self.in_a_file:
            self.fp.write(f"{text}\n")
            self.fp.flush()
        else:
            self.write(text, file=self.fp)

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """Return what prints the bar, in the place of tqdm's own."""
        if _is_terminal(file):
            on_terminal: Callable[[str], None] = tqdm.status_printer(file)
            return on_terminal
        last = [""]

        def print_line(text: str) -> None:
            if (line := text.strip()) and line != last[0]:
                last[0] = line
                file.write(f"{line}\n")
                file.flush()

        return print_line


def _is_terminal(file: TextIO) -> bool:
    return bool(getattr(file, "isatty", lambda: False)())
