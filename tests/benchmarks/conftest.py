"""Makes the machine that the tests of the fused operator's benchmark share."""

from pathlib import Path

import pytest
import torch

from benchmarks.group_norm_silu import __main__ as program
from benchmarks.group_norm_silu import contenders
from tests.benchmarks.made_up_machine import CASES, Pretended


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pretended:
    """Have the program find this machine in place of a GPU, few cases, and a compiler that has nothing to do."""
    pretended = Pretended(torch.device("cpu"))
    monkeypatch.setattr(program, "find_gpu", lambda: pretended)
    monkeypatch.setattr(program, "cases", lambda **_: CASES)
    monkeypatch.setattr(contenders, "compiled", lambda: contenders.eager)
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    monkeypatch.setenv("UNETGN_COMMIT", "abc")
    return pretended
