"""What the site needs beside the documents: the API's pages, files from elsewhere in the repository, formulas, and a
page that a program makes.

MkDocs calls the functions (`hooks` in mkdocs.yml); griffe, which reads the docstrings, calls the class.
"""

from __future__ import annotations

import ast
import html
import logging
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parents[1]
# Documents that lie elsewhere -> where the site has them. Those of docs/ keep their names.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "csrc/README.md": "csrc.md",
    **{f"benchmarks/results/{path.name}": f"results/{path.name}" for path in ROOT.glob("benchmarks/results/*.md")},
}
# A program of docs/ -> the page that it writes, which a link to the program leads to.
MADE = {"docs/make_page.py": "digits_explored.html"}
logger = logging.getLogger("mkdocs.hooks")


@cache  # `mkdocs serve` builds again and again
def made_page(program: str) -> str | None:
    """Return what a program writes, or None where a package is missing that it needs; any other error is one here."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "page.html")
        command = [sys.executable, "-W", "ignore", str(ROOT / program), str(path)]
        environment = os.environ | dict(PYTHONPATH=str(ROOT))
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        last = (done.stderr.splitlines() or [""])[-1]
        if done.returncode and re.match(r"(ModuleNotFound|Import)Error: ", last):
            logger.info(f"{MADE[program]} is left out: {last}")
            return None
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr}")
        return path.read_text()


def public_modules() -> dict[str, ast.Module]:
    """Modules of the package that say what is public, by `__all__`, and are public themselves, as they are written."""
    found = {}
    for path in sorted((ROOT / "dcn_plugin").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        tree = ast.parse(path.read_text())
        says = any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for node in tree.body)
        if says and not any(part.startswith("_") for part in parts):
            found[".".join(parts)] = tree
    return dict(sorted(found.items()))


def api_page(module: str, tree: ast.Module) -> str:
    """Name what mkdocstrings shows: the module, and functions that it would take for the file of the same name."""
    folder, text = ROOT.joinpath(*module.split(".")), f"::: {module}\n"
    for node in ast.walk(tree):
        for name in node.names if isinstance(node, ast.ImportFrom) and node.module else ():
            if (folder / f"{name.name}.py").exists():
                text += f"\n::: {module}.{node.module}.{name.name}\n"
                text += "    options: {heading_level: 2, show_root_full_path: false}\n"
    return text


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the page of the C++ and the API's pages into the navigation."""
    assert config.nav is not None
    if (ROOT / "csrc/README.md").exists():
        config.nav.append(ELSEWHERE["csrc/README.md"])
    config.nav.append({"API": [{name: f"api/{name}.md"} for name in public_modules()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/: written from the docstrings, or kept where the repository wants them."""
    for source, target in ELSEWHERE.items():
        if (ROOT / source).exists():
            files.append(File.generated(config, target, content=(ROOT / source).read_text()))
    for name, tree in public_modules().items():
        files.append(File.generated(config, f"api/{name}.md", content=api_page(name, tree)))
    for program, target in MADE.items():
        if (content := made_page(program)) is not None:
            files.append(File.generated(config, target, content=content))
    files.append(File.generated(config, "site.css", content=HtmlFormatter().get_style_defs(".highlight")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links fit the site's folders; what a link names that the site does not have stays as its words alone."""
    here = {target: source for source, target in ELSEWHERE.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match.groups()
        if re.match(r"\w+:", target):
            return match[0]
        named = os.path.normpath(os.path.join(os.path.dirname(here), target))
        place = (ELSEWHERE | MADE).get(named, named.removeprefix("docs/") if named.startswith("docs/") else "")
        if files.get_file_from_path(place) is None:
            return words
        return f"[{words}]({os.path.relpath(place, os.path.dirname(page.file.src_uri) or '.')}{anchor or ''})"

    markdown = re.sub(r"^```python no-run$", "```python", markdown, flags=re.M)
    return re.sub(r"\[([^\[\]]*)\]\(([^()\s#]+)(#[^()\s]*)?\)", link, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML, which browsers draw by themselves."""

    def formula(match: re.Match[str]) -> str:
        text = html.unescape(match[1]).strip()
        return convert(text[2:-2], display="block" if text.startswith(r"\[") else "inline")

    return re.sub(r'<(?:span|div) class="arithmatex">(.*?)</(?:span|div)>', formula, content, flags=re.S)


class OneDialect(griffe.Extension):
    """Docstrings here say `Example:`, which griffe takes for a remark; its section of examples is `Examples:`."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
