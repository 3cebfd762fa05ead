"""What the tests of `fuse` share."""

import pytest


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of the fused operator from a fused block, while the test runs."""
    import unetgn.fusion.joined as home

    noted = []
    operator = home.group_norm_silu

    def noting(*args, **kwargs):
        noted.append(kwargs)
        return operator(*args, **kwargs)

    monkeypatch.setattr(home, "group_norm_silu", noting)
    return noted


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test of this folder."""
