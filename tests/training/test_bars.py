"""Progress on a terminal and in a file."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

from tests.training.launched import ROOT

PROGRAM = """
from unetgn.training.bars import Bar
bar = Bar(total=50, initial=10, unit="step")
for number in range(40):
    bar.update()
    if number % 10 == 9:
        bar.set_postfix_str(f"loss {number}")
    if number == 14:
        bar.say("a step takes 4 s")
bar.close()
bar = Bar(total=3, disable=True)
bar.say("nothing")
bar.close()
"""


def test_in_a_file_progress_is_lines_of_which_none_says_nothing_new(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, stderr=log, check=True)
    lines = (tmp_path / "log").read_text().split("\n")
    assert lines.pop() == ""
    assert "\r" not in "".join(lines)
    lines.remove("a step takes 4 s")
    assert [line.split(" [")[0] for line in lines] == [
        "10 of 50 steps, 20%",
        *(f"{done} of 50 steps, {2 * done}%" for done in (20, 30, 40, 50)),
    ]
    assert [line.rpartition(", ")[2] for line in lines[1:]] == [f"loss {number}" for number in (9, 19, 29, 39)]


def test_on_a_terminal_it_is_a_bar() -> None:
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, stderr=its, check=True)
    os.set_blocking(ours, False)
    said = ""
    with contextlib.suppress(BlockingIOError):  # the end
        while part := os.read(ours, 100_000):
            said += part.decode()
    os.close(ours)
    os.close(its)
    assert "\ra step takes 4 s\r\n" in said  # a line of its own, above the bar, which comes again
    assert "nothing" not in said
    assert said.replace("\r\n", "").count("\r") > 3
    assert "50/50" in said
    assert "steps" not in said
