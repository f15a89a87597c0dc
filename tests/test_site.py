"""The site builds without a warning, shows every public name, and asks nobody else for anything."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import dcn_plugin

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("mkdocs", "mkdocstrings_handlers.python", "latex2mathml")


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


pytestmark = [
    pytest.mark.skipif(not (ROOT / "mkdocs.yml").exists(), reason="needs a source checkout"),
    pytest.mark.skipif(not all(map(installed, NEEDED)), reason="needs the extra `docs`"),
    pytest.mark.xdist_group("site"),  # one process builds it, once
]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built strictly: a link that leads nowhere or a docstring that cannot be read ends the build."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-8000:]
    return out


def pages(site: Path) -> dict[str, str]:
    found = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    assert len(found) > 20
    return found


def written_names(module: str) -> list[str]:
    """`__all__` of a module as its file has it."""
    spec = importlib.util.find_spec(module)
    assigned = [node for node in ast.parse(Path(spec.origin).read_text()).body if isinstance(node, ast.Assign)]
    (names,) = (node.value for node in assigned if ast.unparse(node.targets[0]) == "__all__")
    return ast.literal_eval(names)


def test_every_public_name_is_on_it(site, imports_everything):
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    known = {line.split(" ", 1)[0] for line in zlib.decompress(inventory).decode().splitlines()}
    missing, seen = [], 0
    names = ["dcn_plugin", *(module.name for module in pkgutil.walk_packages(dcn_plugin.__path__, "dcn_plugin."))]
    for name in names:
        if not any(part.startswith("_") for part in name.split(".")):
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError as error:  # for a package that not every machine has
                assert name == f"dcn_plugin.export.{error.name}"
                module = None
            public = written_names(name) if module is None else getattr(module, "__all__", None)
            if public is None:
                continue
            assert (site / f"api/{name}.html").is_file(), name
            for member in public:
                # A function that bears the name of its file stands under the name of both.
                value, seen = getattr(module, member, None), seen + 1
                own = f"{getattr(value, '__module__', name)}.{getattr(value, '__qualname__', member)}"
                if f"{name}.{member}" not in known and own not in known:
                    missing.append(f"{name}.{member}")
    assert seen > 80 and not missing


def test_every_document_is_on_it(site):
    for document in (ROOT / "docs").glob("*.md"):
        assert (site / f"{document.stem}.html").is_file(), document.name
    assert "What is in the box" in (site / "index.html").read_text()


def test_the_page_of_the_digits_is_on_it(site):
    """Made by a network that is trained while the site is built; the link to the program leads to it."""
    assert 'href="digits_explored.html"' in (site / "explore.html").read_text()
    page = (site / "digits_explored.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert [len(layer["first"]) for layer in data["layers"]] == [9, 9, 9]
    # It has learnt: a fresh layer's offsets are all 0.
    assert all(re.search(r"[B-Za-z]", layer["offset"]["data"]) for layer in data["layers"])


def test_it_works_without_a_network(site):
    """Nothing that a browser loads by itself lies elsewhere. Links that a reader follows may lead anywhere."""
    loads = re.compile(
        r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?((?:https?:)?//[^\s\"'>]+)"
        r"|<link\b[^>]*\bhref=[\"']?((?:https?:)?//[^\s\"'>]+)"
        r"|(?:@import\s+[\"']?|url\([\"']?)((?:https?:)?//[^\s\"')]+)"
    )
    assert loads.search('<script async src="https://example.org/x.js">') and loads.search("url(//example.org/a.woff)")
    found = {}
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        for match in loads.finditer(path.read_text()):
            found.setdefault(path.relative_to(site).as_posix(), []).append(match[0])
    assert not found


def without_code(page: str) -> str:
    return re.sub(r"<(pre|code|script|annotation)\b.*?</\1>", "", page, flags=re.S)


def test_formulas_need_no_script(site):
    source = re.sub(r"^```.*?^```", "", (ROOT / "docs/operators.md").read_text(), flags=re.M | re.S)
    formulas = len(re.findall(r"\$\$.+?\$\$|(?<!\$)\$[^$\n]+\$(?!\$)", re.sub(r"`[^`\n]*`", "", source), re.S))
    page = (site / "operators.html").read_text()
    assert page.count("<math ") == formulas > 20
    for name, page in pages(site).items():
        assert not re.search(r"\\\(|\\\[|\$\$|arithmatex", without_code(page)), name


def test_examples_are_shown_as_code(site):
    shown = 0
    for name, page in pages(site).items():
        shown += page.count("&gt;&gt;&gt; ")
        assert "&gt;&gt;&gt;" not in without_code(page), name
    assert shown > 50
