"""What csrc gives to any type of positions, on positions that are no convolution's, against the reference."""

import pytest
import torch
from toolchain import ROOT, VISIBILITY, WARNINGS, Compiler, NinjaFile, Torch, compile_flags, link_torch

from dcn_plugin import reference


@pytest.fixture(scope="module")
def points():
    found, compiler = Torch.find(), Compiler.find()
    ninja = NinjaFile(f"points-torch{found.version}")
    ninja.compiling("cxx", compiler.command, [*compile_flags(found, "-O1"), *VISIBILITY, *WARNINGS])
    ninja.linking("link", [*compiler.command, "-shared"], link_torch(found))
    library = ninja.build("library.so", "link", [ninja.build("library.o", "cxx", ["tests/positions/library.cpp"])])
    done = ninja.run([library], capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    torch.ops.load_library(str(ROOT / library))
    return torch.ops.dcn_plugin_points


def problem(spread, points=37):
    torch.manual_seed(0)
    maps = torch.randn(3, 5, 7, requires_grad=True)
    where = torch.rand(3, points, 2) * torch.tensor([5.0, 7.0]) * spread - 1
    if spread == 0:
        where = torch.tensor([1.3, 2.6]).repeat(3, points, 1)
    return maps, where.round() if spread == 2 else where, torch.rand(3, points)


def truth(maps, where, weight):
    found = reference.bilinear_sample(maps[:, None], where[..., 0], where[..., 1])
    return found[:, 0] * weight


@pytest.mark.parametrize("spread", [1, 2, 3], ids=["on_the_map", "whole_pixels", "beyond"])
def test_samples_found_many_at_a_time(points, spread):
    maps, where, weight = problem(spread)
    torch.testing.assert_close(points.values(maps.detach(), where, weight), truth(maps, where, weight))


# Of points on a map: cells of a few samples, and such as are divided for sorting, and into chunks of 32 and of 64.
@pytest.mark.parametrize("count", [90, 700, 5000])
@pytest.mark.parametrize("spread", [0, 1, 2, 3], ids=["one_cell", "on_the_map", "whole_pixels", "beyond"])
def test_gradient_through_the_index(points, spread, count):
    maps, where, weight = problem(spread, points=count)
    grad = torch.randn_like(weight)
    (expected,) = torch.autograd.grad(truth(maps, where, weight), maps, grad)
    found = points.gradient_of_maps(grad, where, weight, 5, 7)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, points.gradient_of_maps(grad, where, weight, 5, 7))


def test_divisions_that_the_host_has_prepared(points):
    """All divisors that are special, and others: beside their multiples, and at the end of what 32 bits hold."""
    torch.manual_seed(0)
    powers = {2**k + d for k in range(32) for d in (-1, 0, 1) if 1 <= 2**k + d < 2**31}
    for by in sorted(powers | set(range(1, 70)) | set(torch.randint(1, 2**31 - 1, (500,)).tolist())):
        some = torch.randint(0, (2**31 - 1) // by + 1, (50,)) * by
        numbers = torch.cat([some - 1, some, some + 1, torch.tensor([0, 1, by - 1, 2**31 - 2, 2**31 - 1])])
        numbers = numbers[(numbers >= 0) & (numbers < 2**31)]
        exact = torch.stack([numbers // by, numbers % by], 1)
        assert torch.equal(points.divide(numbers, by, True), exact), by
        assert torch.equal(points.divide(numbers * 5, by, False), torch.stack([numbers * 5 // by, numbers * 5 % by], 1))
