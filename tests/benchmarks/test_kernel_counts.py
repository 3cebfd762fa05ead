"""Tests that the kernels stay as lean as the committed table says, and how it is counted. No GPU takes part."""

import json
import math
import os
from dataclasses import replace
from importlib.util import find_spec

import pytest

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler: installed, and not set to interpret", allow_module_level=True)

import triton

from benchmarks.gpu.checks import name_of
from benchmarks.group_norm_silu.cases import LAYOUTS, SHAPES, Case, Shape
from benchmarks.kernel_counts import CLUSTERS, RESULTS, instructions, table
from benchmarks.kernel_model import CARDS, Work, nanoseconds

COMMITTED = json.loads(RESULTS.read_text())
KNOWN = {(row["case"], row["pass"]): row for row in COMMITTED["rows"]}
GROWTH = 1.10
ALL = [Case(shape, "bfloat16", layout) for shape in SHAPES for layout in LAYOUTS]
OF_ALL_KERNELS: tuple[Shape, ...] = ((32, 256, 64, 64), (8, 1280, 8, 8))

CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00000a0000017a02 */
                                                                     /* 0x000fe40000000f00 */
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
        /*0030*/              @!P0 FADD R5, R5, R4 ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/               @P2 BRA 0x70 ;
        /*0060*/                   STG.E [R2.64], R5 ;
        /*0070*/                   EXIT ;
        /*0080*/                   MUFU.RCP R5, R5 ;
        /*0090*/                   BRA 0x90;
"""
WORK = Work(4096, 8, 4, 1, 16384.0, 16384.0, 100.0, 100.0, 2, 10.0)


def test_the_table_has_every_case_and_no_spills() -> None:
    expected = {(name_of(case), which) for case in ALL for which in ("forward", "backward")}
    assert {key for key in KNOWN if not key[0].endswith(CLUSTERS)} == expected
    held = {which for (name, which) in KNOWN if name.endswith(f"channels_last bfloat16{CLUSTERS}")}
    assert held == {"forward", "backward"}
    assert [one for row in KNOWN.values() for one in row["launches"] if one["spills"]] == []


def faults(case: Case, *, clusters: bool = False) -> list[str]:
    """List the launches of a case that need more than the table says; where the compiler is the table's."""
    if triton.__version__ != COMMITTED["triton"]:
        pytest.skip(f"the table is of Triton {COMMITTED['triton']}, this is {triton.__version__}")
    found = []
    for row in table(case, predicted=False, clusters=clusters):
        if clusters and (row["case"], row["pass"]) not in KNOWN:
            continue  # this pass has none
        known = {one["kernel"]: one for one in KNOWN[row["case"], row["pass"]]["launches"]}
        for one in row["launches"]:
            allowed = known[one["kernel"]]["instructions"] * GROWTH + 0.05 if one["kernel"] in known else math.inf
            if one["instructions"] > allowed or one["spills"]:
                words = f"{one['instructions']} instructions an element, {one['spills']} bytes of spills"
                found.append(f"{row['case']} {one['kernel']}: {words}; allowed are {allowed:.2f} and none")
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", OF_ALL_KERNELS, ids=str)
def test_kernels_need_no_more_instructions_than_the_table_says(shape: Shape, layout: str) -> None:
    assert faults(Case(shape, "bfloat16", layout)) == []


@pytest.mark.thorough
@pytest.mark.parametrize("layout", LAYOUTS)
def test_clusters_need_no_more_instructions_than_the_table_says(layout: str) -> None:
    assert faults(Case((32, 256, 64, 64), "bfloat16", layout), clusters=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_kernels_of_all_cases_need_no_more_instructions_than_the_table_says(case: Case) -> None:
    assert faults(case) == []


def test_a_loop_counts_as_often_as_it_turns_and_what_stands_behind_the_exit_not_at_all() -> None:
    counted = instructions(CODE, (5,))
    assert [times for _, times in counted] == [1, 1, 5, 5, 5, 1, 1, 1]
    assert [name for name, _ in counted][-2:] == ["STG.E", "EXIT"]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("change", [{}, {"programs": 1}, {"turns": 8}, {"stored": 0.0}, {"resident": 1}], ids=str)
def test_no_launch_is_predicted_faster_than_its_bytes_or_its_instructions(card: str, change: dict[str, float]) -> None:
    work = replace(WORK, **change)  # type: ignore[arg-type]
    time = nanoseconds(work, CARDS[card])
    assert time > work.programs * (work.loaded + work.stored) / CARDS[card].copy
    busier = nanoseconds(replace(work, before=100 * work.before), CARDS[card])
    assert busier > work.programs * 100 * work.before / (132 * 4 * 1.755)
