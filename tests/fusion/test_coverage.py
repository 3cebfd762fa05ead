"""Tests the coverage count: what it sees in a run, that its record is of today's code, and that the guide shows it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unetgn
from benchmarks.fuse_coverage import RECIPES, Row, main, measure, readme_table, recorded
from benchmarks.fuse_instances import Recipe
from unetgn.fusion import norm_silu

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "fuse.md"
QUICK = [
    ("diffusers", "UNet2DModel", "DDPM"),
    ("diffusers", "AutoencoderKLMagvit", ""),
    ("diffusers", "VQModel", "MoVQ, norm_type=spatial"),
    ("diffusers.pipelines.ltx.modeling_latent_upsampler", "LTXLatentUpsamplerModel", ""),
]


@pytest.mark.parametrize(("module", "name", "variant"), QUICK, ids=lambda value: value or "-")
def test_a_count_of_today_is_the_recorded_one(module, name, variant):
    recipe = next(recipe for recipe in RECIPES if (recipe.name, recipe.variant) == (name, variant))
    cls = getattr(__import__(module, fromlist=[name]), name)
    assert measure(recipe, cls) == next(row for row in recorded() if (row.model, row.variant) == (name, variant))


def test_every_recipe_is_recorded_with_nothing_wrong_and_a_reason_for_each_place_that_is_left():
    rows = recorded()
    assert {(row.model, row.variant) for row in rows} == {(recipe.name, recipe.variant) for recipe in RECIPES}
    for row in rows:
        assert not row.wrong
        assert bool(row.left) == (row.fused < row.places)


def test_the_guide_shows_the_record():
    assert readme_table(recorded()) in GUIDE.read_text(encoding="utf-8")


def test_the_example_in_the_guide_prints_the_report_that_follows_it(capsys):
    section = GUIDE.read_text(encoding="utf-8")
    code, report = section.split("```python\n", 1)[1].split("```\n\n```\n", 1)
    exec(code, {"__name__": "__main__"})
    assert capsys.readouterr().out.strip() == report.partition("\n```")[0]


def block_class() -> type[nn.Module]:
    """Return a new class, so that rules for it hold in one test alone. Two places, one of them the norm of a sum."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.silu(self.norm1(x))
            y = self.norm2(x)
            return F.silu(y + x)

    return Block


def lying(block: Any, x: Tensor) -> Tensor:
    """List both norms as fused, and fuse the first."""
    x = norm_silu(block.norm1, F.silu, x)
    return F.silu(block.norm2(x) + x)


def wrong_numbers(block: Any, x: Tensor) -> Tensor:
    return norm_silu(block.norm2, F.silu, norm_silu(block.norm1, F.silu, x))


def row_of_block(rule: Callable[..., Tensor]) -> Row:
    """Measure the block, with a rule for it."""
    block = block_class()
    unetgn.fuse.rule(block)(rule)
    return measure(Recipe("tests.Block", lambda: {"x": torch.randn(2, 4, 3, 3)}), block)


def test_a_place_that_the_report_claims_and_the_run_does_not_show_is_wrong():
    row = row_of_block(lying)
    assert (row.places, row.fused) == (2, 1)
    assert row.wrong == "reported as fused, runs as written: norm2"


def test_outputs_that_differ_are_wrong():
    row = row_of_block(wrong_numbers)
    assert (row.places, row.fused) == (2, 2)
    assert "outputs differ" in row.wrong


def count(monkeypatch: pytest.MonkeyPatch, only: str) -> int:
    """Run the command, as `python -m benchmarks.fuse_coverage --only …` does, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["fuse_coverage", "--only", only])
    return main()


def test_the_count_of_one_family_runs_as_a_command(monkeypatch, capsys):
    assert count(monkeypatch, "unets.unet_2d.") == 0
    rows = [line.split("|")[1:6] for line in capsys.readouterr().out.splitlines() if line.startswith("| UNet2DModel")]
    assert len(rows) == 3
    assert all(int(seen) == int(fused) > 0 and not why.strip() for _, _, seen, fused, why in rows)


@pytest.mark.slow
def test_the_count_of_the_installed_diffusers_has_nothing_wrong(monkeypatch):
    assert count(monkeypatch, "diffusers.") == 0
