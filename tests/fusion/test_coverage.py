"""The coverage count, as its reader runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.fuse_coverage", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_count_of_one_family_finds_all_of_its_places():
    result = run("--only", "unets.unet_2d.")
    assert result.returncode == 0, result.stderr
    rows = [line.split("|")[1:6] for line in result.stdout.splitlines() if line.startswith("| UNet2DModel")]
    assert len(rows) == 3
    assert all(int(seen) == int(fused) > 0 and not why.strip() for _, _, seen, fused, why in rows)


def test_the_recorded_count_gives_a_reason_for_each_place_that_is_left():
    rows = json.loads((ROOT / "benchmarks" / "results" / "fuse_coverage.json").read_text())["rows"]
    assert sum(row["fused"] for row in rows) > 0
    for row in rows:
        assert not row["wrong"]
        assert bool(row["left"]) == (row["fused"] < row["places"])


@pytest.mark.slow
def test_the_count_of_the_installed_diffusers_has_nothing_wrong(tmp_path):
    result = run("--only", "diffusers.")
    assert result.returncode == 0, result.stderr
