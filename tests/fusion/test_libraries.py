"""Tests the count of other libraries: its record is of today's recipes, says no wrong, and stands in the guide."""

from pathlib import Path

from benchmarks.fuse_libraries import guide_table, recorded, rows_of
from benchmarks.fuse_recipes_libraries import LIBRARIES

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "fuse.md"


def test_every_model_of_a_recorded_library_is_recorded_with_nothing_wrong_and_a_reason_for_what_is_left():
    recipes = {library.name: [(recipe.name, recipe.variant) for recipe in library.recipes] for library in LIBRARIES}
    for counted in recorded():
        rows = rows_of(counted)
        assert [(row.model, row.variant) for row in rows] == recipes[counted["library"]]
        for row in rows:
            assert not row.wrong
            assert bool(row.left) == (row.fused < row.places)


def test_the_guide_shows_the_record():
    assert guide_table(recorded()) in GUIDE.read_text(encoding="utf-8")
