"""Imports run downward, without a circle; the layers are those of `tests/structure/imports.py`."""

from tests.structure.imports import LAYERS, Import, all_imports, circles, layer_of, modules

# The doors that lead up, when they are used: `UNet.from_diffusers` and `.from_single_file`, for those who look for them
# on the class, and what diffusers' code asks of `UNet.config`.
DOORS = {
    ("unetgn.unet.model", "unetgn.interop.from_diffusers"),
    ("unetgn.unet.model", "unetgn.interop.to_diffusers"),
    ("unetgn.unet.loading", "unetgn.interop.families"),
    # What a run is judged by while it trains is what judges it afterwards.
    ("unetgn.training.evaluation", "unetgn.sampling.extractors"),
    ("unetgn.training.evaluation", "unetgn.sampling.sets"),
    ("unetgn.training.evaluation", "unetgn.sampling.metrics"),
}


def test_every_module_has_a_layer():
    assert {layer_of(module) for module in modules()} == set(range(len(LAYERS)))


def test_imports_run_downward():
    upward = {
        f"{found.importer}:{found.line} imports {found.imported}"
        for found in all_imports()
        if layer_of(found.importer) < layer_of(found.imported) and (found.importer, found.imported) not in DOORS
    }
    assert not upward, sorted(upward)


def test_each_door_that_leads_up_is_there_and_opens_when_it_is_used():
    found = {(found.importer, found.imported): found.deferred for found in all_imports()}
    assert {door: found.get(door) for door in DOORS} == dict.fromkeys(DOORS, True)


def test_no_modules_import_each_other():
    others = [found for found in all_imports() if (found.importer, found.imported) not in DOORS]
    assert circles(others) == []


def test_a_circle_is_found():
    """Through three modules, one of the imports within a function; a fourth that only imports them is no part of it."""
    made_up = [
        Import("a", "b", False, 1),
        Import("b", "c", True, 1),
        Import("c", "a", False, 1),
        Import("d", "a", False, 1),
    ]
    assert circles(made_up) == [["a", "b", "c"]]
