"""What an operator takes is told once, by its schema, and the bits of `wanted` are the same in Python and C++."""

import re
from pathlib import Path

import pytest
import torch
from cases import CASES

from dcn_plugin.ops._operator import ORDERED, WANTED

SOURCE = Path(__file__).resolve().parents[2] / "csrc/core/wanted.h"


def test_bits_of_wanted_are_those_of_the_source():
    (body,) = re.findall(r"enum Wanted : int64_t \{(.*?)\};", SOURCE.read_text(), re.S)
    found = {
        re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(): eval(value)
        for name, value in re.findall(r"k(\w+) = ([\d <]+),", body)
    }
    assert found == {**WANTED, "ordered": ORDERED}
    assert sum(found.values()).bit_count() == len(found), "two names share a bit"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_backward_has_the_forwards_arguments(case):
    """Its gradient first, then tensors and options in the forward's order, then `wanted`; named results."""

    def names(op, tensors):
        return [a.name for a in op._schema.arguments if ("Tensor" in str(a.type)) == tensors]

    forward, backward = names(case.op, True), names(case.backward_op, True)
    options = names(case.op, False)
    assert [a.name for a in case.op._schema.arguments] == forward + options, "tensors come first"
    assert backward == ["grad_output", *(name for name in forward if name in backward)]
    assert [a.name for a in case.backward_op._schema.arguments] == [*backward, *options, "wanted"]
    results = [result.name for result in case.backward_op._schema.returns]
    assert results == [f"grad_{name}" for name in forward if f"grad_{name}" in results]
    assert {result.removeprefix("grad_") for result in results} <= WANTED.keys() & set(backward)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_backward_returns_what_the_bits_name(case):
    """And nothing else: a result that is not asked for is empty."""
    arguments = case.make(case.full)
    grad = torch.ones_like(case.function(**arguments))
    results = [result.name.removeprefix("grad_") for result in case.backward_op._schema.returns]
    for name in results:
        found = case.backward_op(*case.to_backward(grad, WANTED[name], **arguments).values())
        shapes = [t.shape for t in (found if isinstance(found, tuple) else (found,))]
        assert shapes == [arguments[other].shape if other == name else (0,) for other in results]
