"""Checks what `import unetgn` brings along, and what it leaves for later."""

import json
import subprocess
import sys

import pytest
import torch

import unetgn

STAGES = {  # in one process, one after the other
    "package": "import unetgn",
    "packages": "import unetgn.unet, unetgn.pipelines",
    "function": "import torch; x = torch.ones(2, 4, 3); unetgn.group_norm_silu(x.requires_grad_(), 2).sum().backward()",
    "exported": "x = x.detach(); y = torch.export.load(sys.argv[1]).module()(x)",
    "operator": "assert torch.equal(unetgn.GroupNormSiLU(2, 4).requires_grad_(False)(x), y)",
    "derivative": "unetgn.GroupNormSiLU(2, 4)(x).sum().backward()",
    "attributes": "unetgn.nn, unetgn.ops",
    "configuration": "unetgn.UNetConfig(), unetgn.ResBlock",
    "pictures": "import unetgn.pipelines.pictures",
}


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Map each stage to the modules that a process holds after it. The argument is a program of our operator."""
    program = tmp_path_factory.mktemp("exported") / "norm.pt2"
    torch.export.save(torch.export.export(unetgn.GroupNormSiLU(2, 4), (torch.ones(2, 4, 3),)), program)
    code = "import json, sys; found = {}\n"
    code += "".join(f"{stage}; found[{name!r}] = list(sys.modules)\n" for name, stage in STAGES.items())
    command = [sys.executable, "-c", f"{code}print(json.dumps(found))", str(program)]
    result = subprocess.run(command, capture_output=True, check=True)
    return {name: set(found) for name, found in json.loads(result.stdout).items()}


def test_the_packages_import_neither_diffusers_nor_triton_nor_the_compiler(modules):
    assert not modules["packages"] & {"diffusers", "triton", "torch._dynamo", "torch._inductor", "PIL"}


def test_a_program_that_was_exported_loads_in_a_new_process_after_importing_the_package_alone(modules):
    assert "exported" in modules  # the process loaded and ran it, and the operator agreed
    assert "unetgn.ops.library" in modules["package"]
    assert not modules["exported"] & {"diffusers", "unetgn.nn"}


def test_calling_the_operator_on_the_cpu_imports_neither_diffusers_nor_triton_nor_a_compiler(modules):
    assert "unetgn.ops.aten" in modules["operator"]
    assert "torch._dynamo" not in modules["function"]  # the compiler, which takes more than a second
    assert "diffusers" not in modules["derivative"]
    assert not {name for name in modules["derivative"] if name.startswith("unetgn.ops.triton")}


def test_the_packages_are_reached_as_attributes(modules):
    assert modules["attributes"] >= {"unetgn.nn", "unetgn.ops"}


@pytest.mark.parametrize("stage", ["configuration", "pictures"])
def test_the_configuration_and_the_pictures_do_without_diffusers(stage, modules):
    assert not modules[stage] & {"diffusers", "unetgn.unet.model"}


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
