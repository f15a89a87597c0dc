"""Where the package raises: every raise statement, and every call of a helper that raises in an argument's name."""

import ast
import builtins
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import dcn_plugin

PACKAGE = Path(dcn_plugin.__file__).parent
# A function that raises and takes one of these is told by its caller what to call the argument.
TOLD = {"name", "label", "where"}
Function = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class Site(NamedTuple):
    file: str
    first: int
    last: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"dcn_plugin/{self.file}:{self.first}: {self.text}"

    def is_at(self, file: str, line: int, column: int | None) -> bool:
        return self.file == file and self.first <= line <= self.last and column in (None, self.column)


def files() -> list[str]:
    return sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def _tree(file: str) -> ast.Module:
    """The module, each node with its `parent`."""
    tree = ast.parse((PACKAGE / file).read_text())
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node
    return tree


def _parents(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Pairs (node, its parent), from the inside out."""
    while hasattr(node, "parent"):
        yield node, node.parent
        node = node.parent


def _function(node: ast.AST) -> ast.AST | None:
    return next((parent for _, parent in _parents(node) if isinstance(parent, Function)), None)


def _caught(node: ast.Raise) -> bool:
    """Whether the function catches it itself: control flow, whose message nobody sees."""
    kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    raised = getattr(builtins, getattr(kind, "id", ""), None)
    for child, parent in _parents(node):
        if isinstance(parent, Function):
            return False
        if isinstance(parent, ast.Try) and child in parent.body and raised is not None:
            for handler in parent.handlers:
                kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
                caught = [getattr(builtins, getattr(k, "id", ""), None) for k in kinds]
                if any(c is not None and issubclass(raised, c) for c in caught):
                    return True
    return False


def _has_message(node: ast.Raise) -> bool:
    """Not what is passed on as it came, and not the marker of a method that subclasses write."""
    abstract = isinstance(node.exc, ast.Name) and node.exc.id == "NotImplementedError"
    return node.exc is not None and not abstract and not _caught(node)


def _module_of(node: ast.ImportFrom, file: str) -> str:
    """The module that `from ... import` reads, as a file of the package without its suffix."""
    if not node.level:
        return (node.module or "").removeprefix("dcn_plugin").lstrip(".").replace(".", "/")
    folder = Path(file).parent
    for _ in range(node.level - 1):
        folder = folder.parent
    return str(folder / (node.module or "").replace(".", "/"))


def _names(tree: ast.Module, file: str) -> dict[str, tuple[str, str]]:
    """What the module calls by which name: (module, function)."""
    own = file.removesuffix(".py")
    names = {node.name: (own, node.name) for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = _module_of(node, file)
            for item in node.names:
                names[item.asname or item.name] = (module, item.name)
    return names


def _target(func: ast.AST, names: dict[str, tuple[str, str]]) -> tuple[str, str] | None:
    """The function that an expression such as `integer` or `_check.integer` names."""
    if isinstance(func, ast.Name):
        return names.get(func.id)
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id in names:
        module, name = names[func.value.id]
        return str(Path(module) / name), func.attr
    return None


def _calls(tree: ast.Module, names: dict[str, tuple[str, str]], helpers: set) -> list[ast.Call]:
    aliases = {
        node.targets[0].id: _target(node.value, names)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    known = names | {name: target for name, target in aliases.items() if target in helpers}
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _target(node.func, known) in helpers]


@functools.cache
def sites() -> list[Site]:
    """All of the package, in its order."""
    trees = {file: _tree(file) for file in files()}
    names = {file: _names(tree, file) for file, tree in trees.items()}
    found = {
        file: [node for node in ast.walk(tree) if isinstance(node, ast.Raise) and _has_message(node)]
        for file, tree in trees.items()
    }
    helpers: set[tuple[str, str]] = set()
    # A helper may raise through another.
    while True:
        calls = {file: _calls(tree, names[file], helpers) for file, tree in trees.items()}
        more = {
            (file.removesuffix(".py"), function.name)
            for file in trees
            for node in found[file] + calls[file]
            if isinstance(function := _function(node), ast.FunctionDef)
            and TOLD & {argument.arg for argument in function.args.args}
        }
        if more <= helpers:
            break
        helpers |= more
    return sorted(
        Site(file, node.lineno, node.end_lineno, node.col_offset, ast.unparse(node)[:100])
        for file in trees
        for node in found[file] + calls[file]
    )
