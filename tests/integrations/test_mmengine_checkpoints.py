"""With the stand-in, `torch.load` takes what MMEngine's Runner writes, refuses all else, and as before once undone."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict

import pytest
import torch

pytest.importorskip("mmengine")
import mmengine.runner  # noqa: E402, F401  (imports torchao, which allows types of its own)
import numpy as np  # noqa: E402
from mmengine.logging import HistoryBuffer  # noqa: E402

from dcn_plugin.integrations.mmcv import _checkpoints, _readers  # noqa: E402


@pytest.fixture
def allowed():
    before = torch.serialization.get_safe_globals()
    _checkpoints.begin()
    yield
    _checkpoints.end()
    assert set(torch.serialization.get_safe_globals()) == set(before)


@pytest.fixture
def file(tmp_path) -> str:
    """A file of the published layout."""
    hub = dict(log_scalars={"train/loss": HistoryBuffer([0.75, 0.5], [1, 1])}, runtime_info=OrderedDict(epoch=1))
    meta = dict(epoch=np.int64(3), best=np.float64(0.5), dataset_meta=dict(CLASSES=("cat",)), cfg="model = dict()")
    path = str(tmp_path / "published.pth")
    torch.save(dict(meta=meta, message_hub=hub, state_dict=OrderedDict(weight=torch.arange(3.0))), path)
    return path


def test_published_layout(file, allowed):
    from mmengine.runner import load_checkpoint

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.zeros(3))
    loaded = load_checkpoint(layer, file, map_location="cpu", strict=True)
    assert layer.weight.tolist() == [0, 1, 2]
    assert loaded["meta"]["epoch"] == 3 and loaded["meta"]["best"] == 0.5
    buffer = loaded["message_hub"]["log_scalars"]["train/loss"]
    assert buffer.data[0].tolist() == [0.75, 0.5] and buffer.min() == 0.5 and buffer.statistics("mean") == 0.625


def test_refused_without_it_and_afterwards(file):
    for _ in range(2):
        with pytest.raises(pickle.UnpicklingError, match="HistoryBuffer|numpy|getattr"):
            torch.load(file)
        _checkpoints.begin()
        assert torch.load(file)["meta"]["epoch"] == 3
        _checkpoints.end()


class Shell:
    """Is pickled as a call of `function`, and a state for what that returns."""

    def __init__(self, function, arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


def loads(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


def test_getattr_is_for_the_log_alone(allowed):
    with pytest.raises(ValueError, match="name: expected a statistic of MMEngine's HistoryBuffer, got 'update' of"):
        loads(Shell(getattr, (HistoryBuffer, "update")))


NUMBERS = (*"?bBhHiIlLefdFD", ">f4", ">i2", "S3", "U3", ">U3")


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_and_arrays_are_numpys(kind, allowed):
    array = np.array([[1, 0], [3, 2], [1, 5]]).astype(kind)
    found = loads(dict(c=array, f=np.asfortranarray(array), none=array[:0], one=array[1, 0]))
    assert found["one"] == array[1, 0] and type(found["one"]) is type(array[1, 0])
    for name, expected in (("c", array), ("f", array), ("none", array[:0])):
        read = pickle.loads(pickle.dumps(expected))  # by NumPy itself, which turns bytes round
        assert found[name].dtype == read.dtype and np.array_equal(found[name], read)
    assert b"dcn_plugin" not in pickle.dumps(found) and b"dcn_plugin" not in pickle.dumps(found, 2)


DTYPE = Shell(np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63))  # 1 of 63 says: objects
EMPTY = (np.ndarray, (0,), b"b")
RECONSTRUCT = np.zeros(1).__reduce__()[0]
F8 = np.dtype("f8")


@pytest.mark.parametrize(
    ("value", "message"),
    {
        "flags": (DTYPE, "dtype: expected the order of bytes and no fields or flags"),
        "flags of an array": (
            Shell(RECONSTRUCT, EMPTY, (1, (1,), DTYPE, False, b"\1" * 8)),
            "dtype: expected the order of bytes and no fields or flags",
        ),
        "objects": (np.array([None]), "dtype: expected one of numbers or text, such as 'f8', got 'O8'"),
        "records": (np.zeros(1, "f4,f4"), "dtype: expected one of numbers or text, such as 'f8', got 'V8'"),
        "too few bytes": (
            Shell(RECONSTRUCT, EMPTY, (1, (9,), F8, False, b"\1" * 8)),
            r"array: expected 72 bytes for shape \(9,\), got 8",
        ),
        "a list for bytes": (Shell(RECONSTRUCT, EMPTY, (1, (1,), F8, False, [1])), "array: expected 8 bytes .* list"),
        "no sizes": (Shell(RECONSTRUCT, EMPTY, (1, (-1, -1), F8, False, b"\1" * 8)), "array: expected a tuple of at"),
        "no dtype": (Shell(RECONSTRUCT, EMPTY, (1, (1,), 7, False, b"\1")), "dtype: expected one of .*, got 7"),
        "no state": (Shell(RECONSTRUCT, EMPTY, [1]), "array: expected version, shape, dtype, order and bytes, got lis"),
        "no characters": (Shell(RECONSTRUCT, EMPTY, (1, (1,), np.dtype("U1"), False, b"\xff" * 4)), "utf-32"),
    }.values(),
)  # fmt: skip
def test_other_things_of_numpys_are_refused(value, message, allowed):
    with pytest.raises((ValueError, pickle.UnpicklingError), match=message):
        loads(value)


def test_an_array_takes_one_state():
    made = _readers.Array()
    state = (1, (3,), F8, False, np.arange(3.0).tobytes())
    made.__setstate__(state)
    view = torch.from_numpy(made)
    with pytest.raises(ValueError, match="array: expected one state, got a second"):
        made.__setstate__(state)
    assert view.tolist() == [0, 1, 2]


def test_a_log_gives_no_function_of_the_file_to_all_logs(allowed):
    buffer = HistoryBuffer([0.75, 0.5], [1, 1])
    loaded = loads(buffer)
    assert type(loaded) is HistoryBuffer and all(type(each) is np.ndarray for each in loaded.data)
    loaded.update(0.25)
    assert loads(loaded).data[0].tolist() == [0.75, 0.5, 0.25]
    assert loads(HistoryBuffer()).data[0].size == 0
    buffer._statistics_methods = {"mean": torch.Size}
    with pytest.raises(ValueError, match="HistoryBuffer: expected its own statistics, min, max, current, mean, got"):
        loads(buffer)
    assert HistoryBuffer._statistics_methods["mean"] is HistoryBuffer.mean


# What users allow when torch.load asks them to; `transformers` does for the state of NumPy's generator.
OTHERS = [np.ndarray, np.dtype, RECONSTRUCT, np.float64(1).__reduce__()[0], *(type(np.dtype(k)) for k in ("f8", "i8"))]


@pytest.mark.parametrize("first", [True, False])
def test_what_others_allow_goes_on_and_stays(file, first):
    before = set(torch.serialization.get_safe_globals())
    try:
        for ours in (not first, first):
            _checkpoints.begin() if ours else torch.serialization.add_safe_globals(OTHERS)
        assert torch.load(file)["message_hub"]["log_scalars"]["train/loss"].data[0].tolist() == [0.75, 0.5]
        assert loads(np.arange(3)).tolist() == [0, 1, 2]
        _checkpoints.end()
        assert set(torch.serialization.get_safe_globals()) == before | set(OTHERS)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(before))


def test_only_readers_of_ours_are_allowed(allowed):
    for each in _readers.ALLOWED:
        reader = each[0] if isinstance(each, tuple) else each
        assert reader.__module__ == _readers.__name__
