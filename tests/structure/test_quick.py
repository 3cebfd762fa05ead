"""`make quick` takes the tests nearest to a change, within its budget."""

import json
from pathlib import Path

from tests.structure.imports import ROOT, Import
from tests.structure.quick import DURATIONS, fastest_tests, import_graph, nearest_tests, record, within_budget


def test_the_nearest_tests_come_first():
    known = {
        name: ROOT / f"{name.replace('.', '/')}.py" for name in ("a", "b", "tests.test_a", "tests.test_b", "tests.c")
    }
    arrows = [("b", "a"), ("tests.test_a", "a"), ("tests.test_b", "b"), ("tests.c", "a")]
    imports = [Import(importer, imported, False, 1) for importer, imported in arrows]
    assert nearest_tests([ROOT / "a.py"], known, imports) == [ROOT / "tests/test_a.py", ROOT / "tests/test_b.py"]
    assert nearest_tests([ROOT / "b.py"], known, imports) == [ROOT / "tests/test_b.py"]
    assert nearest_tests([ROOT / "README.md"], known, imports) == []


def test_a_change_of_a_block_reaches_its_own_test():
    near = nearest_tests([ROOT / "unetgn/nn/resblock.py"], *import_graph())
    assert ROOT / "tests/nn/test_resblock.py" in near


def test_a_change_of_a_kernel_reaches_the_process_that_interprets_and_nothing_that_runs_only_there():
    near = nearest_tests([ROOT / "unetgn/ops/triton/kernels/elements.py"], *import_graph())
    assert near.count(ROOT / "tests/ops/test_triton_interpreter.py") == 1
    assert not [path for path in near if "interpreted" in path.parts]


def test_the_budget_holds_and_what_is_too_long_by_itself_makes_room():
    durations = {"tests/long.py": {"seconds": 99.0, "tests": 1}, "tests/short.py": {"seconds": 2.0, "tests": 1}}
    tests = [ROOT / "tests/long.py", ROOT / "tests/short.py", ROOT / "tests/unmeasured.py"]
    assert within_budget(tests, durations, 8.0) == tests[1:]
    assert within_budget(tests, durations, 6.0) == [tests[1]]


def test_the_fastest_tests_are_as_many_as_asked_for_and_are_there():
    durations = json.loads(DURATIONS.read_text())
    chosen = fastest_tests(durations, 500)
    assert sum(durations[str(path.relative_to(ROOT))]["tests"] for path in chosen) >= 500
    assert all(path.is_file() for path in chosen)


def test_times_are_recorded_by_file_without_what_was_skipped(tmp_path: Path):
    report = tmp_path / "report.xml"
    case = '<testcase classname="tests.structure.test_quick" name="{}" time="{}">{}</testcase>'
    cases = [case.format("a", 1.25, ""), case.format("b", 2.0, ""), case.format("c", 9.0, "<skipped/>")]
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    assert record(report) == {"tests/structure/test_quick.py": {"seconds": 3.25, "tests": 2}}
