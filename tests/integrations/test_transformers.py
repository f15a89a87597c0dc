"""transformers' detectors and segmenters on our operator: the same numbers, and given back as they were.

The truth is what their own modules compute in float32 and float64, which is exact enough; half precision is compared
with our float32, since their half-precision path on the CPU cannot be trusted.
"""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers_models import MODELS, deformable_detr, rt_detr, stirred  # noqa: E402

import dcn_plugin  # noqa: E402
from dcn_plugin.integrations import transformers as integration  # noqa: E402
from dcn_plugin.integrations.transformers import _modules, accelerate, hub_kernels, installed, uninstall  # noqa: E402

FAMILIES = {
    "d_fine", "deformable_detr", "deimv2", "grounding_dino", "lw_detr", "mask2former", "mm_grounding_dino",
    "omdet_turbo", "oneformer", "pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4", "rf_detr", "rt_detr",
    "rt_detr_v2",
}  # fmt: skip
PACKAGE = Path(transformers.__file__).parent


@pytest.fixture(autouse=True)
def undone(one_thread, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    yield
    uninstall()


@pytest.fixture
def calls(monkeypatch):
    """The calls of our operator, and a stop for whoever samples half values by `F.grid_sample`."""
    made, ours, theirs = [], _modules.ms_deform_attn, nn.functional.grid_sample

    def counted(value, *args, **options):
        made.append(value.dtype)
        return ours(value, *args, **options)

    def sampled(value, *args, **options):
        assert value.dtype.itemsize >= 4
        return theirs(value, *args, **options)

    monkeypatch.setattr(_modules, "ms_deform_attn", counted)
    monkeypatch.setattr(nn.functional, "grid_sample", sampled)
    return made


def attentions(model: nn.Module) -> list[nn.Module]:
    """The modules that have a sampler, by what they hold."""
    return [m for m in model.modules() if hasattr(m, "sampling_offsets") and hasattr(m, "attention_weights")]


def results(model, inputs) -> dict[str, torch.Tensor]:
    """What each module of attention gives, and what the model returns with the weights of all layers."""
    found = {}

    def gather(name, value):
        if torch.is_tensor(value) and value.is_floating_point():
            found[name] = value
        elif isinstance(value, (tuple, list)):
            for i, one in enumerate(value):
                gather(f"{name}.{i}", one)

    hooks = [
        module.register_forward_hook(lambda _, __, out, i=i: gather(f"sampled.{i}", out))
        for i, module in enumerate(attentions(model))
    ]
    returned = model(**inputs, output_attentions=True)
    for hook in hooks:
        hook.remove()
    for name, value in returned.items():
        gather(name, value)
    return found


def gradients(model, found) -> dict[str, torch.Tensor | None]:
    """The gradients of a sum of all results with random factors; constants and -inf of masked words say nothing."""
    generator = torch.Generator().manual_seed(3)
    total = 0.0
    for value in found.values():
        factors = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        if value.requires_grad:
            total = total + (value.masked_fill(value.isinf(), 0.0) * factors).sum() / value.numel() ** 0.5
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    return dict(zip(names, torch.autograd.grad(total, parameters, allow_unused=True), strict=True))


def assert_equal(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys() and found
    for name, theirs in expected.items():
        mine = found[name]
        if theirs is None:
            assert mine is None, name
            continue
        finite = theirs[theirs.isfinite()]
        scale = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
        torch.testing.assert_close(
            mine / scale, theirs / scale, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_results_and_gradients_are_theirs_and_undoing_is_exact(name, calls):
    model, inputs = stirred(name)
    kinds, keys = [type(m) for m in model.modules()], list(model.state_dict())
    before = results(model, inputs)
    of_before = gradients(model, before)
    assert not calls
    with accelerate(model) as served:
        # By what they hold, all of them; the encoders that make precise centres are the rest.
        count = sum(n for kind, n in served.replaced.items() if re.search("(?i)MultiscaleDeformable", kind))
        assert count == len(attentions(model)) > 0 and served.unknown == ()
        assert installed(model) == served.replaced and list(model.state_dict()) == keys
        assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))
        found = results(model, inputs)
        assert len(calls) >= count
        assert_equal(found, before)
        assert_equal(gradients(model, found), of_before)
    assert [type(m) for m in model.modules()] == kinds and installed(model) == {}
    made = len(calls)
    after = results(model, inputs)
    assert len(calls) == made and all(torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.parametrize("name", MODELS)
def test_samples_reach_the_results(name):
    """Without this, the test above would compare what no sampler has a part in."""
    model, inputs = stirred(name)
    with torch.no_grad():
        before = results(model, inputs)
        for module in attentions(model):
            module.sampling_offsets.bias.add_(10)  # boxes are small, and so are their offsets
        after = results(model, inputs)
    changes = {n: (after[n] - value).nan_to_num(0, 0, 0).abs().max() for n, value in before.items()}
    assert all(changes[f"sampled.{i}.0"] > 1e-2 for i in range(len(attentions(model))))
    assert max(change for n, change in changes.items() if "sampled" not in n and "attentions" not in n) > 1e-3


def half(given):
    """Inputs of a module in bfloat16; positions stay as they are."""
    return {
        name: value.bfloat16()
        if torch.is_tensor(value) and value.is_floating_point() and "reference" not in name
        else value
        for name, value in given.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_finite_and_close_to_our_float32(name, calls):
    model, inputs = stirred(name)
    accelerate(model)
    seen = []
    hooks = [
        m.register_forward_hook(lambda m, _, given, out: seen.append((m, given, out[0])), with_kwargs=True)
        for m in attentions(model)
    ]
    with torch.no_grad():
        model(**inputs)
        for hook in hooks:
            hook.remove()
        assert len(seen) == len(hooks)
        for module, given, exact in seen:
            found, weights = copy.deepcopy(module).bfloat16()(**half(given))
            assert found.dtype == weights.dtype == torch.bfloat16 == calls[-1]
            error = (found.float() - exact).abs()
            # 8 bits of inputs, weights and offsets; a sample that lands elsewhere is wrong by as much as it has.
            bound = 0.25 if "discrete" in name else 0.06
            assert error.max() / exact.abs().max() < bound and error.mean() / exact.abs().mean() < bound / 2
        # OmDet-Turbo joins float32 and half tensors before it samples anything: it runs under autocast only.
        autocast = name == "omdet_turbo"
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            whole = results(model, inputs) if autocast else results(model.bfloat16(), half(inputs))
    assert calls[-1] == torch.bfloat16 and not any(value.isnan().any() for value in whole.values())
    # Of masked words and of proposals beyond the image, the scores are -inf.
    assert all(value.isfinite().all() for n, value in whole.items() if "logits" not in n and "enc_outputs" not in n)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "omdet_turbo"])
def test_under_autocast_results_have_the_types_of_theirs(name):
    model, inputs = stirred(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        types = {n: value.dtype for n, value in results(model, inputs).items() if "sampled" not in n}
        with accelerate(model):
            found = results(model, inputs)
        assert {n: found[n].dtype for n in types} == types and "logits" in " ".join(types)


@pytest.mark.parametrize("method", ["default", "discrete"])
def test_samplers_alone_have_the_types_of_theirs_under_autocast(method):
    module = transformers.models.d_fine.modeling_d_fine
    given = torch.randn(1, 12, 2, 4), [(3, 4)], torch.rand(1, 5, 2, 3, 2), torch.rand(1, 5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = module.multi_scale_deformable_attention_v2(*given, [3], method)
        found = _modules.sampled_v2(*given, [3], method)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_encoders_look_from_where_pixels_are_in_half_precision():
    """In bfloat16 the centres of a wide map are rounded to a quarter of a pixel and worse; ours are float32."""
    shapes = [(100, 152), (50, 76)]
    for family, kind in dict(
        deformable_detr="DeformableDetrEncoder", grounding_dino="GroundingDinoEncoder",
        mm_grounding_dino="MMGroundingDinoEncoder", mask2former="Mask2FormerPixelDecoderEncoderOnly",
        oneformer="OneFormerPixelDecoderEncoderOnly",
    ).items():  # fmt: skip
        encoder = getattr(integration._places._families()[family], kind)
        valid = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.5, 0.75], [0.5, 0.75]]])
        exact = encoder.get_reference_points(shapes, valid.double(), "cpu")
        theirs = encoder.get_reference_points(shapes, valid.bfloat16(), "cpu")
        with accelerate():
            ours = encoder.get_reference_points(shapes, valid.bfloat16(), "cpu")
            torch.testing.assert_close(encoder.get_reference_points(shapes, valid.double(), "cpu"), exact)
        assert ours.dtype == torch.float32 and ours.shape == exact.shape
        assert ((ours - exact) * 152).abs().max() < 1e-3 < 0.25 < ((theirs - exact) * 152).abs().max()


def test_the_pixel_of_discrete_has_no_gradient_and_is_the_same_beyond_the_map():
    """`method="discrete"` takes the nearest pixel, clamped: offsets that lead far outside count, and learn nothing."""
    for name in ("rt_detr_v2_discrete", "d_fine_discrete"):
        model, inputs = stirred(name)
        with torch.no_grad():
            for module in attentions(model):
                module.sampling_offsets.bias.mul_(30)
        before = results(model, inputs)
        with accelerate(model):
            found = results(model, inputs)
        assert_equal(found, before)
        of_offsets = {n: g for n, g in gradients(model, found).items() if "sampling_offsets" in n}
        assert of_offsets and set(of_offsets.values()) == {None}


# Everywhere.


def test_every_family_of_transformers_is_known():
    """Read from its sources in another way than ours does; a new one belongs into FAMILIES and into the tests above."""
    linear = re.compile(r"self\.(sampling_offsets|attention_weights) = nn\.Linear")
    found = {
        path.parent.name
        for path in PACKAGE.glob("models/*/modeling_*.py")
        if len(set(linear.findall(path.read_text("utf-8")))) == 2
    }
    assert found == FAMILIES
    with accelerate() as served:
        assert served.replaced.keys() == FAMILIES and served.unknown == ()
        assert all(family in str(served) for family in FAMILIES) and f"transformers {transformers.__version__}" in str(
            served
        )
    tried = {type(make()[0]).__module__.split(".")[2] for make in MODELS.values()}
    assert tried == FAMILIES


@pytest.mark.parametrize("name", ["deformable_detr", "rt_detr_v2", "d_fine", "mask2former", "oneformer"])
def test_models_made_before_and_afterwards_are_served_until_it_is_undone(name, calls, tmp_path):
    model, inputs = stirred(name)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = results(model, inputs)
        with accelerate() as served:
            assert sum(served.replaced.values()) == sum(installed().values()) > 0 and installed(model) == {}
            loaded = type(model).from_pretrained(tmp_path).eval()
            for one in (model, loaded):
                made = len(calls)
                assert_equal(results(one, inputs), expected)
                assert len(calls) > made
        made = len(calls)
        for one in (model, loaded):
            assert all(torch.equal(t, expected[n]) for n, t in results(one, inputs).items())
        assert len(calls) == made and installed() == {}
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]


def members():
    return {
        (family, name, attribute): value
        for family, module in integration._places._families().items()
        for name, kind in vars(module).items()
        if isinstance(kind, type) and kind.__module__ == module.__name__
        for attribute, value in vars(kind).items()
    }


def test_twice_is_once_and_each_gives_back_what_it_replaced(calls):
    before = members()
    first, second = accelerate(), accelerate()
    assert second.replaced == {} and "nothing that was not yet" in str(second)
    second.undo()
    second.undo()
    assert len(installed()) > 15
    first.undo()
    after = members()
    assert after.keys() == before.keys() and all(after[n] is value for n, value in before.items())

    model, inputs = stirred("rt_detr")
    first, second = accelerate(model), accelerate(model)
    assert first.replaced == {"RTDetrMultiscaleDeformableAttention": 2} and second.replaced == {}
    second.undo()
    assert installed(model) == first.replaced
    with accelerate(), torch.no_grad():  # a model served for itself stays so when all no longer are
        model(**inputs)
    made = len(calls)
    with torch.no_grad():
        model(**inputs)
    assert len(calls) == made + 2
    first.undo()
    assert installed(model) == {}


def test_uninstall_withdraws_every_call():
    before = members()
    accelerate()
    accelerate()
    uninstall()
    after = members()
    assert installed() == {} and all(after[n] is value for n, value in before.items())


# One model.


def test_other_models_are_not_touched(calls):
    (one, inputs), (other, _) = stirred("deformable_detr"), stirred("deformable_detr")
    with accelerate(one), torch.no_grad():
        other(**inputs)
        assert not calls and installed(other) == {}
        one(**inputs)
        assert len(calls) == 3


def test_names_and_places_that_others_go_by_stay():
    model, _ = stirred("deformable_detr")
    before = repr(model), [m._get_name() for m in model.modules()], [n for n, _ in model.named_parameters()]
    with accelerate(model):
        assert (
            repr(model),
            [m._get_name() for m in model.modules()],
            [n for n, _ in model.named_parameters()],
        ) == before


@pytest.mark.parametrize("name", ["rt_detr", "d_fine"])  # with Swin as backbone, transformers' models have no pickles
def test_copies_pickles_and_files(name, calls, tmp_path):
    model, inputs = stirred(name)
    kinds = [type(m) for m in model.modules()]
    served = accelerate(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert installed(loaded) == {}
    with torch.no_grad():
        expected = results(loaded, inputs)
        for twin in twins:
            made = len(calls)
            assert installed(twin) == served.replaced
            assert_equal(results(twin, inputs), expected)
            assert len(calls) > made
            uninstall(twin)
            assert installed(twin) == {} and [type(m) for m in twin.modules()] == kinds
    assert installed(model) == served.replaced
    # A plain model takes the weights of one that is served, and the other way round.
    loaded.load_state_dict(model.state_dict())
    model.load_state_dict(loaded.state_dict())


def test_attention_compiles_without_a_break(calls):
    model, inputs = stirred("deformable_detr")
    module, seen = attentions(model)[0], []
    hook = module.register_forward_hook(lambda m, _, given, out: seen.append((given, out)), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
        hook.remove()
        given, expected = seen[0]
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        compiled(**given)
        assert not calls
        with accelerate(compiled) as served:  # looked into, and what was compiled before is compiled anew
            assert served.replaced == {"DeformableDetrMultiscaleDeformableAttention": 1}
            found = compiled(**given)
            assert calls
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        made = len(calls)
        torch.testing.assert_close(compiled(**given)[0], expected[0], rtol=1e-4, atol=1e-5)
        assert len(calls) == made


def test_in_parallel(tmp_path):
    model, inputs = stirred("deformable_detr")
    served = accelerate(model)
    expected = gradients(model, results(model, inputs))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        assert installed(parallel) == served.replaced
        found = results(parallel, inputs)
        assert_equal(gradients(model, found), expected)
    finally:
        torch.distributed.destroy_process_group()


# What is not known.


class OtherSampler(nn.Module):
    """Of the shape that such modules have, with another meaning."""

    def __init__(self):
        super().__init__()
        self.sampling_offsets, self.attention_weights = nn.Linear(4, 4), nn.Linear(4, 2)


def test_what_is_not_known_is_named_and_left_alone():
    model = nn.ModuleList([rt_detr()[0], OtherSampler(), OtherSampler()])
    with pytest.warns(
        UserWarning, match="accelerate: expected the deformable attention of .*, got OtherSampler, which"
    ):
        served = accelerate(model)
    assert served.unknown == ("OtherSampler",) and str(served).endswith("; not known: OtherSampler")
    assert served.replaced == {"RTDetrMultiscaleDeformableAttention": 2} and type(model[1]) is OtherSampler


def test_a_forward_put_onto_a_module_stays_and_its_sampler_is_served():
    """As accelerate's hooks do, which call the one that was there."""
    for name, served_too in {"rt_detr": "MultiScaleDeformableAttention", "rt_detr_v2": None}.items():
        model, inputs = stirred(name)
        kind = type(attentions(model)[0]).__name__
        with torch.no_grad():
            expected = results(model, inputs)
            first = attentions(model)[0]
            first.forward = put = first.forward
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                served = accelerate(model)
            if served_too:
                assert not said and served.replaced == {served_too: 1, kind: 1}
            else:  # its sampler is a function of the file, which other models call too
                assert [f"got {kind}, which keeps" in str(one.message) for one in said] == [True]
                assert served.replaced == {kind: 1} and served.unknown == (kind,)
            assert first.forward is put
            assert_equal(results(model, inputs), expected)


def test_a_version_that_changed_is_named(monkeypatch):
    """Where the text is not the one that ours was written from, nothing is replaced."""
    module = integration._places._families()["rt_detr_v2"]
    kind = module.RTDetrV2MultiscaleDeformableAttention
    before = kind.forward

    def changed(self, *args, **options):
        return before(self, *args, **options)

    monkeypatch.setattr(kind, "forward", changed)
    with pytest.warns(UserWarning, match="got rt_detr_v2.RTDetrV2MultiscaleDeformableAttention, which keeps"):
        served = accelerate()
    assert served.replaced.keys() == FAMILIES - {"rt_detr_v2"} and kind.forward is changed


def own_forward(kind):
    """A user's subclass that computes what its base does, by its own forward."""

    class Own(kind):
        def forward(self, *args, **options):
            return super().forward(*args, **options)

    return Own


@pytest.mark.parametrize("name", ["deformable_detr", "d_fine", "d_fine_discrete"])
def test_around_a_sampler_that_is_known_a_forward_may_be_anything(name, calls):
    model, inputs = stirred(name)
    for module in attentions(model):
        module.__class__ = own_forward(type(module))
    before = results(model, inputs)
    of_before = gradients(model, before)
    with accelerate(model) as served, warnings.catch_warnings():
        warnings.simplefilter("error")
        count = served.replaced["Own" if "d_fine" in name else "MultiScaleDeformableAttention"]
        assert count == len(attentions(model)) and served.unknown == ()
        found = results(model, inputs)
        assert len(calls) == count
        assert_equal(found, before)
        assert_equal(gradients(model, found), of_before)
    assert installed(model) == {} and all(torch.equal(t, before[n]) for n, t in results(model, inputs).items())


def test_what_was_changed_since_stays():
    model, _ = rt_detr()
    served = accelerate(model)
    module = attentions(model)[0]
    module.__class__ = changed = own_forward(type(module))
    with pytest.warns(UserWarning, match="undo: expected RTDetrMultiscaleDeformableAttention as `accelerate` left it"):
        served.undo()
    assert type(module) is changed and type(attentions(model)[1]).__bases__ == (nn.Module,)


# Layers for the `kernels` package.


def test_our_layer_has_what_kernels_asks_of_one():
    ours = integration.MultiScaleDeformableAttention
    assert ours.__init__ is nn.Module.__init__
    assert {n for n, _ in inspect.getmembers(ours)} - {n for n, _ in inspect.getmembers(nn.Module)} == {
        "can_torch_compile", "has_backward",
    }  # fmt: skip
    mapping = hub_kernels()
    assert {device: repository.load() for device, repository in mapping[ours.__name__].items()} == dict(
        cpu=ours, cuda=ours
    )
    assert "dcn_plugin" in str(mapping[ours.__name__]["cpu"]) and hash(mapping[ours.__name__]["cpu"])
    for family, module in integration._places._families().items():
        if theirs := vars(module).get(ours.__name__):
            kinds = [[p.kind for p in inspect.signature(one.forward).parameters.values()] for one in (ours, theirs)]
            assert kinds[0] == kinds[1], family


def test_kernels_puts_our_layer_in(calls):
    kernels = pytest.importorskip("kernels")
    model, inputs = stirred("deformable_detr")
    sampler = type(attentions(model)[0].attn)
    kernels.replace_kernel_forward_from_hub(sampler, "MultiScaleDeformableAttention")
    with torch.no_grad(), kernels.use_kernel_mapping(hub_kernels()):
        expected = results(model, inputs)
        kernels.kernelize(
            model, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device="cpu", use_fallback=False
        )
        found = results(model, inputs)
    assert len(calls) == 3
    assert_equal(found, expected)


# A program that knows nothing of it.

PROGRAM = """
import sys, torch
sys.path.insert(0, {tests!r})
import transformers_models
from dcn_plugin.integrations.transformers import _modules, installed
model, inputs = transformers_models.rt_detr()
made, ours = [], _modules.ms_deform_attn
_modules.ms_deform_attn = lambda *args, **options: made.append(1) or ours(*args, **options)
with torch.no_grad():
    model.eval()(**inputs)
print(len(made), len(installed()))
"""


def test_a_program_is_served_by_name(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(tests=str(Path(__file__).parents[1])))
    command = [sys.executable, "-m", "dcn_plugin", "--accelerate", "transformers", str(script)]
    folders = os.pathsep.join(filter(None, [str(Path(dcn_plugin.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        command, env=dict(os.environ, PYTHONPATH=folders), capture_output=True, text=True, timeout=300, check=True
    )
    assert run.stdout.split() == ["2", str(len(ALL_CLASSES))]
    said = [line for line in run.stderr.splitlines() if "ms_deform_attn" in line]
    assert len(said) == 1 and "rt_detr_v2 on ms_deform_attn of dcn_plugin" in said[0]


ALL_CLASSES = {
    "MultiScaleDeformableAttention", "DeformableDetrEncoder", "GroundingDinoEncoder", "MMGroundingDinoEncoder",
    "Mask2FormerPixelDecoderEncoderOnly", "OneFormerPixelDecoderEncoderOnly",
    *(f"{prefix}MultiscaleDeformableAttention" for prefix in (
        "DFine", "DeformableDetr", "Deimv2", "GroundingDino", "LwDetr", "MMGroundingDino",
        "Mask2FormerPixelDecoderEncoder", "OmDetTurbo", "OneFormerPixelDecoderEncoder", "PPDocLayoutV2",
        "PPDocLayoutV3", "PPDocLayoutV4", "RTDetr", "RTDetrV2", "RfDetr",
    )),
}  # fmt: skip


def test_the_default_arguments_of_a_model_are_enough():
    model, inputs = deformable_detr()
    with accelerate(model), torch.no_grad():
        assert model.eval()(pixel_values=inputs["pixel_values"]).logits.isfinite().all()
