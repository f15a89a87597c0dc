"""Files of weights as they are found: shards, weights beside other things, averaged ones; what is no checkpoint."""

import argparse
import collections
import gzip
import importlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dcn_plugin
from dcn_plugin import DCNv2, _unpickling
from dcn_plugin.checkpoint import extract_weights, load_checkpoint, match_wrappers, read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
OTHER = {name: value + 1 for name, value in WEIGHTS.items()}


def are(state, expected):
    return list(state) == list(expected) and all(torch.equal(state[name], value) for name, value in expected.items())


def command_in(path):
    with pytest.raises(ValueError, match="so it is not read") as error:
        read_checkpoint(path)
    return re.search(r"(python -c .*?); then read", str(error.value)).group(1)


# The printed command


class Recorder:
    """Of a class that is not there any more where the file is read; reading it would call `open`."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (self.trace, "w"))


class Options(dict):
    """A dict of a class of its own, as configs are."""


def gone(value):
    """An object whose class cannot be imported where the file is read."""
    module = types.ModuleType("gone_project.models")
    kind = type("Thing", (nn.Module if isinstance(value, nn.Module) else object,), {"__module__": module.__name__})
    module.Thing = kind
    sys.modules["gone_project"], sys.modules[module.__name__] = types.ModuleType("gone_project"), module
    made = kind()
    if isinstance(value, nn.Module):
        made.a = value
    return made


LAYOUTS = {
    "model beside a Namespace": lambda: {"model": WEIGHTS, "args": argparse.Namespace(lr=0.1), "epoch": 3},
    "state dict beside a Namespace": lambda: {**WEIGHTS, "args": argparse.Namespace(lr=0.1), "epoch": 3},
    "nested": lambda: {"net": {"weights": WEIGHTS, "options": Options(depth=3)}, "args": argparse.Namespace()},
    "averaged": lambda: {"args": argparse.Namespace(), "ema": {"module": WEIGHTS, "updates": 7}, "model": OTHER},
    "a dict of a class of its own": lambda: {"model": Options(WEIGHTS)},
    "a class that is not installed": lambda: {"model_state": WEIGHTS, "trainer": gone(None)},
    "a whole model": lambda: nn.ModuleDict({"a": loaded_linear()}),
    "a whole model of a class that is not installed": lambda: {"model": gone(loaded_linear()), "epoch": 3},
}
KEYS = {"nested": "net.weights", "averaged": "ema.module"}


def loaded_linear():
    made = nn.Linear(3, 2)
    made.load_state_dict({name[2:]: value for name, value in WEIGHTS.items()})
    return made


@pytest.fixture
def forget():
    yield
    for name in ("gone_project", "gone_project.models"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code", "ignore:TypedStorage")
def test_the_printed_command_takes_the_weights_out(tmp_path, layout, zipped, forget):
    torch.save(LAYOUTS[layout](), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    for name in ("gone_project", "gone_project.models"):
        sys.modules.pop(name, None)
    code = re.search(r'python -c "(.*)"', command_in(tmp_path / "x.pth")).group(1)
    exec(code, {})
    state = read_checkpoint(tmp_path / "x_weights.pth", key=KEYS.get(layout))
    assert are(state, WEIGHTS)
    model = nn.ModuleDict({"a": nn.Linear(3, 2)})
    load_checkpoint(model, tmp_path / "x_weights.pth", key=KEYS.get(layout))
    assert are(model.state_dict(), WEIGHTS)


@pytest.mark.parametrize(
    "layout, file", [("averaged", "x.pth"), ("state dict beside a Namespace", "it's $HOME `a`.pth.tar")]
)
def test_the_printed_command_runs_in_a_shell(tmp_path, layout, file):
    torch.save(LAYOUTS[layout](), tmp_path / file)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        ["sh", "-c", command_in(tmp_path / file)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    (written,) = tmp_path.glob("*_weights.pth")
    assert are(read_checkpoint(written, key=KEYS.get(layout)), WEIGHTS)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_taking_weights_out_runs_none_of_the_files_code(tmp_path, zipped):
    trace = tmp_path / "executed"
    torch.save(
        {"model": WEIGHTS, "log": [Recorder(str(trace)), 1]}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped
    )
    assert extract_weights(tmp_path / "x.pth", tmp_path / "y.pth") == ["log[0] (io.open)"]
    assert not trace.exists()
    assert are(read_checkpoint(tmp_path / "y.pth"), WEIGHTS)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_arrays_of_a_raw_pickle_are_taken_out(tmp_path, protocol):
    arrays = {name: value.numpy() for name, value in WEIGHTS.items()}
    content = {"model": arrays, "__author__": "someone", "matching_heuristics": True, "args": argparse.Namespace()}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    code = re.search(r'python -c "(.*)"', command_in(tmp_path / "R-50.pkl")).group(1)
    exec(code, {})
    assert are(read_checkpoint(tmp_path / "R-50_weights.pth"), WEIGHTS)


@pytest.mark.parametrize("protocol", (2, pickle.HIGHEST_PROTOCOL))
def test_arrays_are_read_as_numpy_reads_them(tmp_path, protocol):
    kinds = "? i1 i2 i4 i8 u1 f2 f4 f8 c8 c16 >i4 >f8 >c8".split()
    arrays = {kind: (np.arange(12).reshape(3, 4) % 5).astype(kind) for kind in kinds}
    arrays |= {
        "columns": np.asfortranarray(arrays["f4"]),
        "none": np.zeros((0, 3), "f4"),
        "single": np.array(7.0),
        "scalar": np.float32(1.5),
        "part": arrays["f4"][:, ::2],
    }
    others = {"objects": np.array([{}, None]), "text": np.array(["a"]), "records": np.zeros(2, "i4,f4")}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": arrays | others}, protocol=protocol))
    left_out = extract_weights(tmp_path / "x.pkl", tmp_path / "y.pth")
    assert left_out == [f"model.{name} (numpy.ndarray)" for name in others]
    found = torch.load(tmp_path / "y.pth", weights_only=True)["model"]
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        expected = torch.from_numpy(np.array(array, np.dtype(array.dtype).newbyteorder("=")))
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0, msg=name)


def instruction_to_set(module, name):
    """A pickle that asks for an attribute of a global: `(None, {"marked": 1})` is the state of that."""
    return f"c{module}\n{name}\n".encode().join((b"\x80\x02", b"N}X\x06\x00\x00\x00markedK\x01s\x86b."))


@pytest.mark.parametrize(
    "module, name",
    [("torch._utils", "_rebuild_tensor_v2"), ("collections", "Counter"), ("torch.nn.parameter", "Parameter")],
)
def test_nothing_of_the_running_program_is_changed(tmp_path, module, name):
    (tmp_path / "x.pkl").write_bytes(instruction_to_set(module, name))
    with pytest.raises(ValueError, match="expected weights, got none"):
        extract_weights(tmp_path / "x.pkl", tmp_path / "y.pth")
    assert not hasattr(getattr(importlib.import_module(module), name), "marked")


def test_numpy_takes_no_orders_from_a_file(tmp_path):
    """Its dtype believes flags that a file sets, which say what in an array is an address."""
    array, dtype = np.zeros(2, "f4"), np.dtype("f4")
    state = (3, "<", None, None, None, -1, -1, 64)

    class Told:
        def __reduce__(self):
            return np.dtype, ("f4", False, True), state

    told = np.dtype("f4", copy=True)
    told.__setstate__(state)
    assert told.flags != dtype.flags  # what numpy does
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"w": array, "told": Told()}, protocol=2))
    assert extract_weights(tmp_path / "x.pkl", tmp_path / "y.pth") == ["told (numpy.dtype)"]
    made = _unpickling._Unpickler(io.BytesIO((tmp_path / "x.pkl").read_bytes())).load()
    assert not any(isinstance(value, (np.ndarray, np.dtype)) for value in made.values())


class RunsCode(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        print("code of the file ran")
        self.weight, self.training = state

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_named_and_does_not_run(tmp_path, capfd):
    torch.jit.script(RunsCode()).save(tmp_path / "x.pt")
    torch.jit.load(tmp_path / "x.pt")
    assert "code of the file ran" in capfd.readouterr().out
    with pytest.raises(ValueError, match="TorchScript"):
        extract_weights(tmp_path / "x.pt", tmp_path / "y.pth")
    # However it is packed: torch has a reader of its own, which does not need the directory that Python's goes by.
    with pytest.raises(ValueError, match="TorchScript"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_unpickling, "refuse_others", lambda path: None)
        extract_weights(tmp_path / "x.pt", tmp_path / "y.pth")
    assert "code of the file ran" not in capfd.readouterr().out


def test_containers_in_themselves_are_an_error(tmp_path):
    content = {"w": torch.zeros(2)}
    content["itself"] = content
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="in each other without end"):
        extract_weights(tmp_path / "x.pth", tmp_path / "y.pth")


def test_buffers_that_are_not_saved_stay_out(tmp_path):
    model = nn.Sequential(nn.BatchNorm2d(2), DCNv2(2, 2, 3))
    model.register_buffer("passing", torch.zeros(3), persistent=False)
    torch.save(model, tmp_path / "x.pth")
    extract_weights(tmp_path / "x.pth", tmp_path / "y.pth")
    assert are(read_checkpoint(tmp_path / "y.pth"), model.state_dict())


# What is no checkpoint


def lfs(size=102530333):
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {size}\n".encode()


def zip_of(**members):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    return write


def tar_of(path):
    (path.parent / "weights.pth").write_bytes(b"x")
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "weights.pth", "weights.pth")


def torchscript(path):
    torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3)).save(path)


FOUND = {
    "pointer": (lfs(), r"got a Git LFS pointer, not the file of 102.5 MB itself: run `git lfs pull`"),
    "page": (
        b"<!DOCTYPE html>\n<html><head><title>Sign in</title>",
        r"got an HTML page \('Sign in'\), not a checkpoint",
    ),
    "page with a mark": (b"\xef\xbb\xbf\n <html lang=en>", "got an HTML page, not a checkpoint"),
    "error in XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "got an HTML page, not a checkpoint"),
    "gzip": (gzip.compress(b"x"), "got a gzip archive: unpack it first"),
    "Keras": (b"\x89HDF\r\n\x1a\n" + bytes(20), "got an HDF5 file, as Keras writes"),
    "zip": (zip_of(**{"a/weights.pth": b"x", "a/readme.txt": b"y"}), "got a zip archive of a/weights.pth, a/read"),
    "tar": (tar_of, "got a tar archive of weights.pth: unpack it first"),
    "TorchScript": (torchscript, r"got a TorchScript archive.*torch.jit.load\('.*'\).state_dict\(\)"),
}


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("what", FOUND)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_is_no_checkpoint_is_named(tmp_path, name, what):
    content, message = FOUND[what]
    content(tmp_path / name) if callable(content) else (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: expected a checkpoint, {message}"):
        read_checkpoint(tmp_path / name)


def test_every_reader_names_a_pointer(tmp_path):
    finetune = pytest.importorskip("dcn_plugin.finetune")
    pointer = tmp_path / "model.safetensors"
    pointer.write_bytes(lfs())
    (tmp_path / "config.json").write_text("{}")
    model = dict(name="resnet18_dcn", channels=(8, 8, 8, 8), num_classes=2)
    for read in (
        lambda: load_checkpoint(nn.Linear(2, 2), pointer),
        lambda: load_checkpoint(nn.Linear(2, 2), tmp_path),
        lambda: finetune.FinetuneModule(model, checkpoint=str(pointer)),
        lambda: finetune.FinetuneModule.restore(pointer),
        lambda: finetune.load_exported(tmp_path),
        lambda: finetune.run(dict(model=model, data=dict(name="")), tmp_path / "run", "test", pointer),
        lambda: dcn_plugin.mm.TimmBackbone("resnet18_dcn", checkpoint_path=pointer),
    ):
        with pytest.raises(ValueError, match=r"model.safetensors: expected a checkpoint, got a Git LFS pointer"):
            read()


def test_content_decides_how_a_file_is_read(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(WEIGHTS, tmp_path / "a.pth")
    torch.save(WEIGHTS, tmp_path / "b.safetensors")
    assert are({k: v for k, v in sorted(read_checkpoint(tmp_path / "a.pth").items(), reverse=True)}, WEIGHTS)
    assert are(read_checkpoint(tmp_path / "b.safetensors"), WEIGHTS)


# Shards


def shards(folder, kind, save):
    names = [f"{kind[0]}-{i:05}-of-00002.{kind[1]}" for i in (1, 2)]
    for name, (key, value) in zip(names, WEIGHTS.items(), strict=True):
        save({key: value}, folder / name)
    index = folder / f"{kind[0]}.{kind[1]}.index.json"
    places = dict(zip(WEIGHTS, names, strict=True))
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": places}))
    return index


@pytest.mark.parametrize("kind", [("model", "safetensors"), ("pytorch_model", "bin")], ids=["safetensors", "bin"])
def test_shards_are_read_by_index_or_folder(tmp_path, kind):
    save = pytest.importorskip("safetensors.torch").save_file if kind[1] == "safetensors" else torch.save
    index = shards(tmp_path, kind, save)
    for source in (index, tmp_path, str(tmp_path)):
        assert are(read_checkpoint(source), WEIGHTS)
        model = nn.ModuleDict({"a": nn.Linear(3, 2)})
        load_checkpoint(model, source)
        assert are(model.state_dict(), WEIGHTS)
    one = tmp_path / f"{kind[0]}-00001-of-00002.{kind[1]}"
    with pytest.raises(
        RuntimeError, match="1 missing .*a.bias\n.*this is shard 1 of 2: give the index file or the folder"
    ):
        load_checkpoint(nn.ModuleDict({"a": nn.Linear(3, 2)}), one)
    one.write_bytes(lfs())
    with pytest.raises(ValueError, match="00001-of-00002.* got a Git LFS pointer"):
        read_checkpoint(index)
    one.unlink()
    with pytest.raises(FileNotFoundError, match=f"expected 2 shards beside it, got all but 1: {one.name}"):
        read_checkpoint(tmp_path)


def test_a_folder_with_both_formats_is_read_once(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    shards(tmp_path, ("model", "safetensors"), save_file)
    shards(tmp_path, ("pytorch_model", "bin"), torch.save)
    assert are(read_checkpoint(tmp_path), WEIGHTS)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "last.ckpt"])
def test_the_only_file_of_a_folder_is_read(tmp_path, name):
    pytest.importorskip("safetensors.torch")
    save = sys.modules["safetensors.torch"].save_file if name.endswith("safetensors") else torch.save
    save(WEIGHTS, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert sorted(read_checkpoint(tmp_path)) == sorted(WEIGHTS)


@pytest.mark.parametrize(
    "content, error, message",
    [
        ('{"weight_map": ', ValueError, "expected a readable index of shards"),
        ('{"architectures": ["ResNet"]}', ValueError, "got JSON without a weight_map"),
        ("[1, 2]", ValueError, "got JSON without a weight_map"),
        ('{"weight_map": {"a": "../model.bin"}}', ValueError, "expected names of files beside it, got '../model.bin'"),
        ('{"weight_map": {"a.weight": "x.bin", "b": "x.bin"}}', ValueError, "expected 'b' in 'x.bin', got a file wit"),
    ],
)
def test_a_bad_index_is_named(tmp_path, content, error, message):
    torch.save(WEIGHTS, tmp_path / "x.bin")
    (tmp_path / "model.bin.index.json").write_text(content)
    with pytest.raises(error, match=f"model.bin.index.json.*{message}"):
        read_checkpoint(tmp_path / "model.bin.index.json")


def test_folders_without_one_file_of_weights_say_what_they_hold(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="expected a checkpoint file in this folder, got notes.txt"):
        read_checkpoint(tmp_path)
    for name in ("a.pth", "b.pth"):
        torch.save(WEIGHTS, tmp_path / name)
    with pytest.raises(ValueError, match=r"expected one file of weights, got 2 \(a.pth, b.pth\): give one"):
        read_checkpoint(tmp_path)


def test_a_distributed_checkpoint_is_named_with_a_command_that_works(tmp_path):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    checkpoint.save({"state_dict": dict(WEIGHTS)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(ValueError, match="got a checkpoint of torch.distributed.checkpoint") as error:
        read_checkpoint(tmp_path / "dcp")
    command = re.search(r"python (-m torch.*)", str(error.value)).group(1)
    subprocess.run([sys.executable, *command.split()], check=True, capture_output=True)
    assert are(read_checkpoint(tmp_path / "dcp.pth"), WEIGHTS)


# Averaged weights

AVERAGED = {
    "RT-DETR": ({"model": OTHER, "ema": {"module": WEIGHTS, "updates": 3}, "last_epoch": 1}, "ema.module"),
    "MMEngine": ({"state_dict": OTHER, "ema_state_dict": {**WEIGHTS, "steps": torch.tensor(3)}}, "ema_state_dict"),
    "Lightning, what is not averaged": ({"state_dict": OTHER, "current_model_state": WEIGHTS}, "current_model_state"),
    "Lightning's SWA": (
        {
            "state_dict": OTHER,
            "callbacks": {"StochasticWeightAveraging": {"n_averaged": 2, "average_model_state": WEIGHTS}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        },
        "callbacks.StochasticWeightAveraging.average_model_state",
    ),
    "a callback with dots in its name": (
        {"state_dict": OTHER, "callbacks": {"EMA{'decay': 0.99}": {"weights": WEIGHTS}}},
        "callbacks.EMA{'decay': 0.99}.weights",
    ),
    "BasicSR": ({"params": OTHER, "params_ema": WEIGHTS}, "params_ema"),
    "beside a state dict": ({**OTHER, "ema": {"module": WEIGHTS}}, "ema.module"),
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_averaged_weights_are_listed_and_chosen(tmp_path, kind):
    content, key = AVERAGED[kind]
    torch.save(content, tmp_path / "x.pth")
    model = nn.ModuleDict({"a": nn.Linear(3, 2)})
    report = load_checkpoint(model, tmp_path / "x.pth")
    assert are(model.state_dict(), OTHER)
    assert [note for note in report.notes if f"the file also holds {key!r} (choose with key=)" in note], report.notes
    wanted = {name: value for name, value in content.items() if name != key}
    for chosen in (key, [*key.split(".")]) if "{" not in key else (key, ["callbacks", "EMA{'decay': 0.99}", "weights"]):
        assert are({k: v for k, v in read_checkpoint(tmp_path / "x.pth", key=chosen).items() if v.dim()}, WEIGHTS)
        load_checkpoint(model, tmp_path / "x.pth", key=chosen, allow_unexpected="steps")
        assert are(model.state_dict(), WEIGHTS)
    assert wanted


@pytest.mark.parametrize(
    ("key", "averaged"), [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("state_dict", "model_ema")]
)
def test_under_timms_names_averaged_weights_are_taken_as_timm_does(tmp_path, key, averaged):
    timm = pytest.importorskip("timm")
    file = tmp_path / "x.pth"
    torch.save({key: OTHER, averaged: WEIGHTS, "epoch": 1}, file)
    model = nn.ModuleDict({"a": nn.Linear(3, 2)})
    report = load_checkpoint(model, file)
    assert f"took {averaged!r}; the file also holds {key!r} (choose with key=)" in report.notes
    assert are(model.state_dict(), WEIGHTS) and are(read_checkpoint(file), WEIGHTS)
    timm.models.load_checkpoint(model, str(file))
    assert are(model.state_dict(), WEIGHTS)
    load_checkpoint(model, file, key=key)
    assert are(model.state_dict(), OTHER)
    for none in ({}, {"decay": 0.9, "updates": 3}, {"decay": torch.tensor(0.9)}, {"module": {}}):
        torch.save({key: OTHER, averaged: none}, file)
        load_checkpoint(model, file)
        assert are(model.state_dict(), OTHER)


def test_only_averaged_weights_are_found():
    for content in ({"ema": {"module": WEIGHTS}, "epoch": 1}, {"module": WEIGHTS}, {"params_ema": WEIGHTS}):
        model = nn.ModuleDict({"a": nn.Linear(3, 2)})
        assert not load_checkpoint(model, content).notes
        assert are(model.state_dict(), WEIGHTS)


def test_a_wrong_key_lists_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"which has 'ema', 'epoch' \(weights under 'ema.module'\), got 'ema.modul'"):
        load_checkpoint(nn.Linear(2, 2), {"ema": {"module": WEIGHTS}, "epoch": 1}, key="ema.modul")
    with pytest.raises(TypeError, match=r"got a dict under 'net'.*with key=; it has weights under 'net.deep'"):
        load_checkpoint(nn.Linear(2, 2), {"net": {"deep": WEIGHTS}})


def test_what_lies_beside_the_weights_is_left_alone():
    model = nn.ModuleDict({"a": nn.Linear(3, 2)})
    report = load_checkpoint(model, {**WEIGHTS, "epoch": 3, "classes": ["cat"], "best": 0.5})
    assert are(model.state_dict(), WEIGHTS)
    assert report.notes == ["left alone, since they are no tensors: 'epoch', 'classes', 'best'"]


# What wrappers put into names


def network():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "layer1": nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)),
            "layer2": nn.Sequential(DCNv2(4, 4, 3, bias=False)),
        }
    )


WRAPPED = {
    "model._orig_mod.": lambda name: f"model._orig_mod.{name}",
    "_orig_mod.model.": lambda name: f"_orig_mod.model.{name}",
    "layer1._orig_mod.": lambda name: name.replace("layer1.", "layer1._orig_mod."),
    "every layer": lambda name: re.sub(r"(layer\d\.\d)", r"\1._orig_mod", name),
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
    "backbone.module.": lambda name: f"backbone.module.{name}",
    "layer2.module.": lambda name: name.replace("layer2.", "layer2.module."),
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace("layer2.", "layer2._fsdp_wrapped_module."),
    "activation checkpointing": lambda name: name.replace("layer1.", "layer1._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_names_with_wrappers_inside_load(kind):
    source, target = network(), network()
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor.add_(1)
    state = collections.OrderedDict((WRAPPED[kind](name), value) for name, value in source.state_dict().items())
    report = load_checkpoint(target, state)
    assert are(target.state_dict(), source.state_dict())
    assert report.loaded == list(target.state_dict()) and any(
        "wrappers put into names" in note for note in report.notes
    )
    assert are(match_wrappers(target, state), source.state_dict())


def test_earlier_names_and_a_prefix_beside_wrappers():
    source, target = network(), network()
    state = {
        f"net.layer1._orig_mod.{n[7:]}" if n[:7] == "layer1." else f"net.{n}": v for n, v in source.state_dict().items()
    }
    state = {name.replace("0.conv_offset.", "0_offset."): value + 1 for name, value in state.items()}
    load_checkpoint(target, state, prefix="net.")
    assert all(torch.equal(value, source.state_dict()[name] + 1) for name, value in target.state_dict().items())
    with pytest.raises(RuntimeError, match="missing"):
        load_checkpoint(target, {f"model._orig_mod.{k}": v for k, v in source.state_dict().items()}, prefix="")


@pytest.mark.parametrize("where", ["", "layer1", "layer2.0"])
def test_a_compiled_model_takes_plain_and_wrapped_weights(where):
    source, target = network(), network()
    if where:
        parent, _, child = where.rpartition(".")
        target.get_submodule(parent)._modules[child] = torch.compile(target.get_submodule(where))
    else:
        target = torch.compile(target)
    assert any("_orig_mod" in name for name in target.state_dict())
    for prefix in ("", "module.", "model._orig_mod."):
        state = {prefix + name: value + len(prefix) + 1 for name, value in source.state_dict().items()}
        load_checkpoint(target, state)
        for name, value in target.state_dict().items():
            assert torch.equal(value, state[prefix + name.replace("_orig_mod.", "")]), name


def test_a_part_that_is_called_module_keeps_its_name():
    def made():
        return nn.ModuleDict({"mixer": nn.ModuleDict({"module": nn.Linear(2, 2), "scale": nn.Linear(2, 2)})})

    source, target = made(), made()
    assert not load_checkpoint(target, source.state_dict()).notes
    assert are(target.state_dict(), source.state_dict())


def test_versions_of_modules_follow_their_names():
    class Versioned(nn.Linear):
        _version = 5

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            self.seen = local_metadata.get("version")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    source = nn.ModuleDict({"model": nn.ModuleDict({"_orig_mod": nn.ModuleDict({"a": Versioned(2, 2)})})})
    target = nn.ModuleDict({"a": Versioned(2, 2)})
    load_checkpoint(target, source.state_dict())
    assert target["a"].seen == 5


def test_checkpoints_of_compiled_and_plain_modules_restore_each_other(tmp_path):
    finetune = pytest.importorskip("dcn_plugin.finetune")
    check_fits = importlib.import_module("dcn_plugin.finetune.run")._check_fits

    def made():
        return finetune.FinetuneModule(dict(name="resnet18_dcn", channels=(8, 8, 8, 8), num_classes=2))

    plain, compiled = made(), made()
    compiled.model = torch.compile(compiled.model)
    for source in (plain, compiled):
        saved = dict(
            state_dict=source.state_dict(), hyper_parameters=dict(source.hparams), dcn_plugin={}, lr_schedulers=[]
        )
        torch.save(saved, tmp_path / "x.ckpt")
        for other in (plain, compiled):  # what a run does first
            check_fits(other, {name: tuple(value.shape) for name, value in saved["state_dict"].items()}, "x.ckpt")
        again = finetune.FinetuneModule.restore(tmp_path / "x.ckpt")
        assert all(
            torch.equal(a, b) for a, b in zip(again.state_dict().values(), saved["state_dict"].values(), strict=True)
        )
    compiled.load_saved(dict(saved, state_dict=plain.state_dict()))  # as Lightning does when it continues
    assert all(
        torch.equal(a, b) for a, b in zip(compiled.state_dict().values(), plain.state_dict().values(), strict=True)
    )


def test_numpy_values_are_taken():
    model = nn.ModuleDict({"a": nn.Linear(3, 2)})
    load_checkpoint(model, {name: np.asarray(value) for name, value in WEIGHTS.items()})
    assert are(model.state_dict(), WEIGHTS)
