"""The CUDA operators on CPU tensors: the GPU's source, compiled for the host with an emulated thread block."""

import functools
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
from toolchain import ROOT, VISIBILITY, WARNINGS, Compiler, NinjaFile, Torch, compile_flags, link_torch

# What the sanitizers' run adds to the compiler's command (tests/ops/test_emulated_cuda.py).
FLAGS = "DCN_PLUGIN_EMULATION_FLAGS"


def build(flags: str = "") -> Path:
    """Compile the library if anything that it is made of has changed; processes that ask at once take turns."""
    found, compiler = Torch.find(), Compiler.find()
    ninja = NinjaFile("-".join(["emulation", f"torch{found.version}", *flags.replace("=", "-").split()]))
    own = ["-Itests/emulation", "-g1", *VISIBILITY, *WARNINGS, *shlex.split(flags)]
    ninja.compiling("cxx", compiler.command, [*compile_flags(found, "-O2"), *own])
    ninja.linking("link", [*compiler.command, "-shared", *shlex.split(flags)], link_torch(found))
    compiled = ninja.build("library.o", "cxx", ["tests/emulation/library.cpp"])
    library = ninja.build("library.so", "link", [compiled])
    done = ninja.run([library], capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / library


@functools.cache
def library() -> Path:
    return build(os.environ.get(FLAGS, ""))


@functools.cache
def give_schemas() -> torch.library.Library:
    """Define the emulated operators, with the schemas of the package's own; they live as long as what is returned."""
    schemas = torch.library.Library("dcn_plugin_emulated", "FRAGMENT")
    for name in torch._C._dispatch_get_all_op_names():
        space, _, own = name.partition("::")
        if space == "dcn_plugin" and not own.startswith("_"):
            schemas.define(str(getattr(torch.ops.dcn_plugin, own).default._schema).removeprefix("dcn_plugin::"))
    return schemas


def load() -> object:
    """Return the namespace of the emulated operators, or skip the calling test where they cannot be."""
    if sys.platform != "linux":
        pytest.skip("the emulated block needs Linux")
    trouble = load_once()
    assert trouble is None, trouble
    return torch.ops.dcn_plugin_emulated


@functools.cache
def load_once() -> str | None:
    """Return what the compiler said, if it failed: once for all tests."""
    try:
        give_schemas()
        torch.ops.load_library(str(library()))
    except AssertionError as error:
        return str(error)
    return None
