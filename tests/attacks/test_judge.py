"""The judge of attacks: what is lost, wrong or hung is seen, and named by the command that repeats it."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.attacks.judge import Count, Draw, Kind, Lost, Verdict, Wrong, command, ended, fingerprint, judge, refused
from unetgn.programs.allocator import keep_freed_memory


def crash(draw: Draw, folder: Path) -> Verdict | None:
    os.kill(os.getpid(), signal.SIGSEGV)
    return None


def hang(draw: Draw, folder: Path) -> Verdict | None:
    time.sleep(60)
    return None


def swell(draw: Draw, folder: Path) -> Verdict | None:
    bytearray(b"x") * 2**28
    return None


def exhaust(draw: Draw, folder: Path) -> Verdict | None:
    bytearray(2**34)
    return None


def lose(draw: Draw, folder: Path) -> Verdict | None:
    raise Lost("gone")


def fall(draw: Draw, folder: Path) -> Verdict | None:
    raise KeyError("step")


def say_much(draw: Draw, folder: Path) -> Verdict | None:
    return refused(ValueError("one line\nand another"))


OUTCOMES = {
    crash: "wrong",
    hang: "hung",
    swell: "hung",
    exhaust: "hung",
    lose: "lost",
    fall: "wrong",
    say_much: "wrong",
}


def verdicts_beside(attack) -> dict[int, Verdict]:
    """Judge three attacks, the second of which is this one; the others do nothing."""
    bad = Kind("bad", lambda draw, folder: attack(draw, folder) if draw.number == 1 else None, 1.0, 2**26)
    return dict(judge(bad, 7, range(3)))


@pytest.mark.parametrize("attack", OUTCOMES)
def test_a_bad_end_is_seen_and_the_attacks_after_it_are_made(attack) -> None:
    verdicts = verdicts_beside(attack)
    assert [verdicts[number].outcome for number in range(3)] == ["survived", OUTCOMES[attack], "survived"]
    count = Count()
    for number, verdict in verdicts.items():
        count.add("bad", 7, number, verdict)
    (fault,) = count.faults
    assert fault["again"] == command("bad", 7, 1)
    assert count.tried == 3


def test_memory_is_counted_also_where_this_process_keeps_what_it_frees() -> None:
    """As it does once it has trained: the attack is given pages that are there already."""
    keep_freed_memory("cpu")
    blocks = [torch.ones(2**22) for _ in range(64)]  # 1 GiB
    del blocks
    assert verdicts_beside(swell)[1].outcome == "hung"


def test_the_same_name_draws_the_same() -> None:
    assert [Draw("a kind", 1, 2).random() for _ in range(2)] == [Draw("a kind", 1, 2).random()] * 2
    assert Draw("a kind", 1, 2).random() != Draw("a kind", 1, 3).random()


@pytest.mark.parametrize(
    ("code", "said"), [(1, ""), (3, "train.py: error: x"), (1, "Traceback (most recent call last)")]
)
def test_a_script_ends_in_one_line_of_its_own(code: int, said: str) -> None:
    with pytest.raises(Wrong):
        ended(code, said)
    assert ended(2, "WARNING: y\ntrain.py: error: x\n") == Verdict("refused", "train.py: error: x")


def test_a_fingerprint_sees_what_a_folder_holds(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = fingerprint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "a").write_text("2")
    after = fingerprint(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {"a", "pipe", "link"}
