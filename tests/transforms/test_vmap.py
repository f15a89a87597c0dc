"""torch.func.vmap of every operator: one call for all samples, the gradients too."""

import itertools

import pytest
import torch
from cases import CASES, OpCase, assert_close, convert, leaves, run, tensors
from coverings import by_turns

from dcn_plugin.ops._operator import WANTED

from .parts import SAMPLES, batch_of, each_case, mapped, names_of, sample

# "There is a performance drop": torch's fallback, sample by sample.
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")
each_config = by_turns("case, config", [(c, k) for c in CASES for k in c.configs])


@each_config
def test_vmap_equals_a_loop_for_each_batched_argument_and_all(case: OpCase, config, device):
    arguments = case.make(config, device=device)
    names = names_of(arguments)
    for chosen in [*((n,) for n in names), tuple(names)]:
        batch = batch_of(arguments, chosen)
        dims = tuple(i % batch[name].dim() for i, name in enumerate(chosen))
        moved = [value.movedim(0, d) for value, d in zip(batch.values(), dims, strict=True)]
        expected = [case.reference(**sample(arguments, batch, i)) for i in range(SAMPLES)]
        assert_close(
            mapped(case.function, arguments, chosen, dims)(*moved), torch.stack(expected), torch.float64, str(chosen)
        )


@each_config
def test_gradients_through_vmap_equal_a_loop(case: OpCase, config, device):
    arguments = case.make(config, device=device)
    names = names_of(arguments)
    batch = batch_of(arguments, names)
    wanted = {n: v.requires_grad_() for n, v in batch.items() if n in tensors(arguments)}
    out = mapped(case.function, arguments, names)(*batch.values())
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, list(wanted.values()), grad)
    for i in range(SAMPLES):
        expected = run(case.reference, sample(arguments, batch, i), grad[i])
        for name, value in zip(wanted, found, strict=True):
            assert_close(value[i], expected[f"grad_{name}"], torch.float64, name)


@each_config
def test_batched_gradients_of_the_result(case: OpCase, config, device):
    """The backward's rule, for each gradient alone (others are then not computed) and for all."""
    arguments = leaves(case.make(config, device=device))
    wanted = tensors(arguments)
    out, truth = case.function(**arguments), case.reference(**arguments)
    grads = torch.randn(SAMPLES, *out.shape, dtype=out.dtype)
    for chosen in [*([n] for n in wanted), list(wanted)]:
        targets = [wanted[n] for n in chosen]
        found = torch.autograd.grad(out, targets, grads, is_grads_batched=True, retain_graph=True)
        for i in range(SAMPLES):
            expected = torch.autograd.grad(truth, targets, grads[i], retain_graph=True)
            for name, value, one in zip(chosen, found, expected, strict=True):
                assert_close(value[i], one, torch.float64, name)


@each_case
def test_backward_operator_maps_over_any_argument(case: OpCase, device):
    arguments = case.make(case.mixed, device=device)
    grad = torch.randn_like(case.function(**arguments))

    def backward(grad_output, **given):
        return case.backward_op(*case.to_backward(grad_output, sum(WANTED.values()), **given).values())

    every = {"grad_output": grad, **arguments}
    for name in set(names_of(every)) & {a.name for a in case.backward_op._schema.arguments}:  # a bias is none
        batch = batch_of(every, [name])
        found = mapped(backward, every, [name])(*batch.values())
        for i in range(SAMPLES):
            expected = backward(**sample(every, batch, i))
            results = ((v,) if isinstance(v, torch.Tensor) else v for v in (found, expected))
            for left, right in zip(*results, strict=True):
                assert_close(left[i], right, torch.float64, name)


@each_case
def test_nested_vmap(case: OpCase):
    arguments = case.make(case.mixed)
    names = names_of(arguments)
    for outer, inner in itertools.permutations(names, 2):
        first, second = batch_of(arguments, [outer], 2), batch_of(arguments, [inner])
        call = mapped(case.function, arguments, [outer, inner], (None, 0))
        found = torch.func.vmap(call, (0, None))(first[outer], second[inner])
        for i, j in itertools.product(range(2), range(SAMPLES)):
            one = sample(sample(arguments, first, i), second, j)
            assert_close(found[i, j], case.reference(**one), torch.float64, f"{outer}, {inner}")
    batch = batch_of(arguments, names, 6)
    twice = torch.func.vmap(mapped(case.function, arguments, names))
    found = twice(*(value.unflatten(0, (2, 3)) for value in batch.values()))
    assert_close(found.flatten(0, 1), mapped(case.function, arguments, names)(*batch.values()), torch.float64)


@each_case
@pytest.mark.parametrize("config", ["full", "bare"])
def test_no_samples_and_samples_without_images(case: OpCase, config):
    arguments = leaves(case.make(getattr(case, config)))
    out, names = case.function(**arguments), names_of(arguments)
    for chosen in [*((n,) for n in names), tuple(names)]:
        none = [arguments[n].detach()[None][:0].requires_grad_(n in tensors(arguments)) for n in chosen]
        found = mapped(case.function, arguments, chosen)(*none)
        assert found.shape == (0, *out.shape)
        # They are in the graph: a training loop does not stop at an empty batch.
        for value in none:
            if value.requires_grad:
                assert torch.autograd.grad(found.sum(), value, retain_graph=True)[0].shape == value.shape
    wanted = list(tensors(arguments).values())
    grads = torch.func.vmap(lambda g: torch.autograd.grad(out, wanted, g))(torch.empty(0, *out.shape).to(out))
    assert [g.shape for g in grads] == [(0, *v.shape) for v in wanted]
    empty = {k: v[:0] if k in case.per_result else v for k, v in arguments.items()}
    batch = {n: torch.stack([empty[n]] * SAMPLES) for n in names}
    assert mapped(case.function, empty, names)(*batch.values()).shape == (SAMPLES, 0, *out.shape[1:])


@each_case
def test_mapped_calls_compile_whole(case: OpCase):
    arguments = case.make(case.mixed)
    names = names_of(arguments)
    batch = batch_of(arguments, names)
    call = mapped(case.function, arguments, names)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*batch.values()), call(*batch.values()), torch.float64)


@each_case
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_vmap_under_autocast(case: OpCase, half, device):
    arguments = case.make(case.mixed, torch.float32, device)
    names = names_of(arguments)
    batch = batch_of(arguments, names)
    with torch.autocast(device, half):
        found = mapped(case.function, arguments, names)(*batch.values())
        expected = [case.function(**sample(arguments, batch, i)) for i in range(SAMPLES)]
    assert found.dtype == half
    assert_close(found, torch.stack(expected), half)


@each_case
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_vmap_in_half_precision(case: OpCase, half, device):
    """More images than half precision can number: 300 is no bfloat16, 3000 no float16."""
    arguments = case.make(case.mixed, half, device)
    names = names_of(arguments)
    samples = 300 if half == torch.bfloat16 else 1500
    batch = {n: v.expand(samples, *v.shape[1:]) for n, v in batch_of(arguments, names, 1).items()}
    scale = torch.linspace(0.5, 2, samples).to(half).view(-1, 1, 1, 1, 1).to(device)
    batch[case.image] = batch[case.image] * scale
    found = mapped(case.function, arguments, names)(*batch.values())
    assert found.dtype == half
    for i in (0, samples // 2 + 1, samples - 1):
        expected = case.reference(**convert(sample(arguments, batch, i), dtype=torch.float64, device="cpu"))
        assert_close(found[i], expected, half)


@pytest.mark.parametrize("case", [c for c in CASES if "rois" in c.per_result], ids=lambda c: c.name)
@pytest.mark.parametrize("chosen", [("input",), ("rois",), ("input", "rois")], ids="+".join)
def test_regions_that_name_no_image_stay_invalid(case: OpCase, chosen, device):
    """Shifted into the images of all samples, they would name one of a neighbour. Python would refuse them first."""
    arguments = case.make(case.full, device=device)
    images = arguments["input"].shape[0]
    # 1e-17 is no whole number, but added to that of an image it would be.
    wrong = torch.tensor([-1.0, images, 0.5, torch.nan, 1e-17]).to(arguments["rois"])
    arguments["rois"][: len(wrong), 0] = wrong
    arguments["rois"][len(wrong) :, 0] = images - 1
    batch = batch_of(arguments, chosen)
    batch["input"] = batch.get("input", torch.stack([arguments["input"]] * SAMPLES)).requires_grad_()
    names = tuple(batch)
    found = mapped(case.compiled, arguments, names)(*batch.values())
    assert found[:, : len(wrong)].isnan().all()
    for i in range(SAMPLES):
        alone = case.compiled(**sample(arguments, batch, i))
        assert_close(found[i], alone, torch.float64)
        assert not found[i, len(wrong) :].isnan().any()
    (grad,) = torch.autograd.grad(found[:, len(wrong) :].sum(), batch["input"], retain_graph=True)
    (all_of_it,) = torch.autograd.grad(found.sum(), batch["input"])
    assert torch.equal(grad, all_of_it) and grad[:, images - 1].any() and not grad[:, : images - 1].any()
