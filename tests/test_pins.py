"""Whatever the tested packages stand on is pinned with them, or named here with the reason why it need not be."""

from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_packaging import PYPROJECT

WHY_NOT = {
    "pins it exactly itself": "ast-serialize cuda-bindings cuda-toolkit librt tokenizers triton",
    "draws pictures, whose pixels no test compares": (
        "contourpy cycler fonttools kiwisolver pyparsing python-dateutil six"
    ),
    "prints": "click prettytable rich tabulate termcolor terminaltables typer wcwidth",
    "serves scikit-learn's training, of which only load_digits is called": "joblib narwhals threadpoolctl",
    "runs tests and checks, whose outcome shows": "execnet iniconfig mypy-extensions pathspec pluggy sortedcontainers",
    "is the interpreter's own business (versions, types, locks, templates, graphs)": (
        "filelock flatbuffers jinja2 markupsafe networkx packaging psutil typing-extensions"
    ),
    "serves parts of MkDocs that are not called (deploying, watching files, its tags of YAML)": (
        "ghp-import mergedeep mkdocs-get-deps pyyaml-env-tag watchdog"
    ),
    "fetches, where no test may": "hf-xet httpx2 platformdirs requests",
    "serves parts that are not called (others' loops, configs, files)": (
        "importlib-metadata iopath mat4py modelindex mpmath openvino-telemetry portalocker yacs"
    ),
}


def test_what_the_tested_packages_need_is_pinned_or_has_a_reason():
    group = [Requirement(pin) for pin in PYPROJECT["dependency-groups"]["tested"]]
    pins = {canonicalize_name(pin.name) for pin in group if pin.marker is None or pin.marker.evaluate()}
    known = pins | {name for names in WHY_NOT.values() for name in names.split()}
    missing, seen = {}, 0
    for name in sorted(pins):
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # tools and peers that this environment goes without
        for need in map(Requirement, needs):
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            seen += 1
            if canonicalize_name(need.name) not in known and not need.name.startswith("nvidia-"):
                missing.setdefault(need.name, []).append(name)
    assert seen > 20 and not missing, f"neither pinned nor excused: {missing}"


@pytest.mark.parametrize("names", WHY_NOT.values())
def test_no_excuse_is_for_what_is_pinned(names):
    pins = {canonicalize_name(Requirement(pin).name) for pin in PYPROJECT["dependency-groups"]["tested"]}
    assert not pins & set(names.split())
