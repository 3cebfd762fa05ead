"""What several tests of data need."""

from pathlib import Path

import pytest

from tests.training.data.caches import cache


@pytest.fixture(scope="module")
def both_ways(stable_diffusion: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with captions and both directions of each image; to be copied before it is changed."""
    out = tmp_path_factory.mktemp("both_ways")
    assert cache(stable_diffusion, photographs, out, "--flip", "--text-encoder", str(stable_diffusion)) == 0
    return out
