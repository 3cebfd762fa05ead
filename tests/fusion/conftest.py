"""What the tests of `fuse` share."""

import pytest
import torch


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
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
