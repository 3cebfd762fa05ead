"""What `import unetgn` brings along, and what it leaves for later."""

import subprocess
import sys

import pytest

import unetgn


def modules_after(code):
    code = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_import_unetgn_imports_neither_diffusers_nor_triton_nor_torch():
    assert not modules_after("import unetgn") & {"diffusers", "triton", "torch"}


def test_calling_the_operator_on_the_cpu_imports_neither_diffusers_nor_triton():
    code = "import torch, unetgn\nunetgn.GroupNormSiLU(2, 4)(torch.ones(1, 4, 3)).sum().backward()"
    modules = modules_after(code)
    assert "unetgn.ops.aten" in modules
    assert "diffusers" not in modules
    assert not {name for name in modules if name.startswith("unetgn.ops.triton")}


@pytest.mark.parametrize("name", unetgn.__all__)
def test_every_exported_name_can_be_had(name):
    assert callable(getattr(unetgn, name))
    assert name in dir(unetgn)


def test_type_checkers_are_told_every_exported_name():
    with open(unetgn.__file__, encoding="utf-8") as file:
        source = file.read()
    for name in unetgn.__all__:
        assert f" import {name} as {name}\n" in source


def test_an_unknown_name_is_an_error_that_lists_the_others():
    with pytest.raises(AttributeError, match=r"no attribute 'groupnorm'; it exports .*group_norm_silu"):
        unetgn.groupnorm  # noqa: B018


def test_the_packages_are_reached_as_attributes():
    assert modules_after("import unetgn; unetgn.nn, unetgn.ops") >= {"unetgn.nn", "unetgn.ops"}
