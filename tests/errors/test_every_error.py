"""Every error of the package is raised by a case, and names the argument, what was expected and what came.

The statements that raise are found in the source, so a new one without a case fails here.
"""

import importlib
import re
from importlib.util import find_spec

import pytest

from errors.case import outcome
from errors.sites import files, sites

# The tables reach into every part of the package.
_NEEDED = "pytorch_lightning timm mmengine torchmetrics torchvision sklearn onnxscript ncnn pnnx"
for _name in _NEEDED.split():
    pytest.importorskip(_name)

# Table of cases -> the files whose errors it raises.
PARTS = {
    "ops": ("ops/", "reference/"),
    "layers": ("layers/", "detection/roi_pool.py"),
    "aggregation": ("layers/_aggregation.py", "layers/channels.py", "layers/dcnv3.py"),
    "samplers": tuple(
        f"layers/{name}.py" for name in ("active_conv", "conv1d", "dilated", "max_pool", "spatial_transformer")
    ),
    "alignment": ("layers/alignment.py",),
    "models": ("models/", "mm/", "detection/"),
    "visualize": ("visualize/",),
    "finetune": ("finetune/", "_config.py", "export/folder.py", "export/forms.py", "models/build.py"),
    "detection": (
        "finetune/detection/",
        "finetune/photos.py",
        "finetune/scenes.py",
        "finetune/seeded.py",
        "finetune/transforms.py",
        "detection/spec.py",
    ),
    "segmentation": ("segmentation/", "finetune/segmentation/", "finetune/masks.py", "visualize/masks.py"),
    "export": tuple(
        f"export/{name}.py" for name in ("agreement", "ncnn", "executorch", "grid_sample", "tensorrt", "torchvision")
    ),
    "integrations": ("integrations/",),
    "mmcv": tuple(
        f"integrations/mmcv/{name}.py"
        for name in ("attention", "losses", "masks", "nms", "norms", "regions", "upsampling")
    ),
    "transformers": ("integrations/transformers/",),
    "core": (
        "convert.py",
        "inference.py",
        "checkpoint.py",
        "_weight_files.py",
        "_unpickling.py",
        "export/onnx.py",
        "export/_onnx_forms.py",
        "export/openvino.py",
        "ops/_exporters.py",
        "_extension.py",
        "registry.py",
        "mm/optim.py",
        "mm/hooks.py",
    ),
}
# transformers has no release that is tested with Python 3.10.
ABSENT = {part for part in ("transformers",) if find_spec(part) is None}
TABLES = {part: importlib.import_module(f"errors.table_{part}") for part in PARTS if part not in ABSENT}
CASES = [
    pytest.param(case, id=f"{part}-{i}-{case.name[:30]}")
    for part, table in TABLES.items()
    for i, case in enumerate(table.CASES)
]


def part_of(file: str) -> str | None:
    """The part with the longest matching beginning."""
    found = {prefix: part for part, prefixes in PARTS.items() for prefix in prefixes if file.startswith(prefix)}
    return found[max(found, key=len)] if found else None


@pytest.mark.parametrize("case", CASES)
def test_message_names_argument_expected_and_got(case):
    error = outcome(case).error
    assert type(error) is case.error, repr(error)
    for words in (case.name, case.expected, case.got):
        assert words and words in str(error), f"{words!r} is not in {error!r}"
    # One grammar: `name: expected ..., got ...`, never 'name must be ...'. What files hold is said in sentences.
    assert not re.match(r"[^:]*\bmust (be|have|hold)\b", str(error)), error
    assert ", got " not in str(error) or re.search(r"\S: expected .+, got ", str(error), re.S), error


@pytest.mark.parametrize("part", TABLES)
def test_every_statement_that_raises_is_reached(part):
    reached = frozenset().union(*(outcome(case).places for case in TABLES[part].CASES))
    missed = [
        str(site) for site in sites() if part_of(site.file) == part and not any(site.is_at(*place) for place in reached)
    ]
    assert not missed, "no case raises\n" + "\n".join(missed)


def test_every_file_that_raises_belongs_to_a_table():
    assert not [str(site) for site in sites() if part_of(site.file) is None]
    assert all(any(file.startswith(prefix) for file in files()) for prefixes in PARTS.values() for prefix in prefixes)
