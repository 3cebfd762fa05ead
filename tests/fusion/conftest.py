"""Holds what the tests of `fuse` share."""

import pytest

from unetgn import ops


@pytest.fixture
def calls(monkeypatch):
    """Note the keyword arguments of every call of the fused operator from a fused block, while the test runs."""
    noted = []
    operator = ops.group_norm_silu

    def noting(*args, **kwargs):
        noted.append(kwargs)
        return operator(*args, **kwargs)

    monkeypatch.setattr(ops, "group_norm_silu", noting)
    return noted


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Run every test of this folder on one thread."""
