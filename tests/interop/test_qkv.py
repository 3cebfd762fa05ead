"""Checks the three orders of packed attention rows against their definition: row = position of (part, head, width)."""

import pytest
import torch

from unetgn.interop.qkv import as_matrix, unpack

HEADS, WIDTH = 3, 4
INDEX = torch.arange(3 * HEADS * WIDTH)


def position(order, part, head, channel):
    """Return the row of a packed projection that holds `channel` of `head` of the query (0), key (1) or value (2)."""
    return {
        "new": (part * HEADS + head) * WIDTH + channel,
        "legacy": (head * 3 + part) * WIDTH + channel,
        "edm": (head * WIDTH + channel) * 3 + part,
    }[order]


@pytest.mark.parametrize("order", ["new", "legacy", "edm"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_rows_come_out_by_head_and_width(order, part):
    expected = [position(order, part, head, channel) for head in range(HEADS) for channel in range(WIDTH)]
    assert unpack(order, HEADS, part)(INDEX).tolist() == expected


@pytest.mark.parametrize("tail", [(5,), (5, 1), (5, 1, 1)])
def test_weights_of_convolutions_become_matrices(tail):
    packed = INDEX[:, None].expand(-1, 5).reshape(-1, *tail)
    assert unpack("edm", HEADS, 1)(packed).shape == (HEADS * WIDTH, 5)
    assert as_matrix(packed).shape == (3 * HEADS * WIDTH, 5)
