"""Tests that a test does not change the threads of those that come after it: bits depend on them."""

import torch

BEFORE = torch.get_num_threads()


def test_threads_may_be_set() -> None:
    torch.set_num_threads(BEFORE + 1)
    assert torch.get_num_threads() == BEFORE + 1


def test_and_are_given_back() -> None:
    assert torch.get_num_threads() == BEFORE
