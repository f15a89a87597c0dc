"""A function of another package on `ms_deform_attn`, wherever modules hold it: what some integrations share.

Whether theirs is known is asked of itself: on a small example, both have to compute the same.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..ops._transforms import is_tracing

logger = logging.getLogger("dcn_plugin")

Attention = Callable[..., Tensor]


class Accelerated:
    """What a call of `accelerate` put in place, and the way back: `undo()`, or the end of a `with` block.

    Printed, it says in one line what runs on what.
    """

    def __init__(self, function: ServedFunction, modules: Sequence[str]) -> None:
        self._function = function
        self.modules = tuple(modules)

    def undo(self) -> None:
        """Withdraw this request. The function is theirs again once nobody asks any more. Twice is once."""
        self._function.withdraw(self)

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        function = self._function
        where = ", ".join(name.removeprefix(f"{function.package}.") for name in self.modules)
        return (
            f"{function.package} {function.version()}: {function.name} of {where} on ms_deform_attn of dcn_plugin "
            f"{__version__}"
        )


class ServedFunction:
    """A function of another package, and ours with its signature.

    Args:
        package: theirs.
        module: where in it the function is defined.
        name: of the function.
        users: modules of the package that take it by name, to have them in memory.
        ours: what serves its calls.
        examples: positional arguments of small calls, in the forms that versions of theirs take: of these, one has to
            be taken and to agree.
    """

    def __init__(
        self, package: str, module: str, name: str, users: Sequence[str], ours: Attention,
        examples: Callable[[], Iterator[tuple[Any, ...]]],
    ) -> None:  # fmt: skip
        self.package, self.name, self._ours, self._examples = package, name, ours, examples
        self._home, self._users = f"{package}.{module}", [f"{package}.{user}" for user in users]
        self._lock = threading.RLock()
        self._askers: list[Accelerated] = []
        self._theirs: Attention | None = None
        self._served: Attention | None = None

    def version(self) -> str:
        try:
            return version(self.package)
        except PackageNotFoundError:  # a checkout on the path
            return "of unknown version"

    def accelerate(self) -> Accelerated:
        """Serve the function; see the integrations' own `accelerate`."""
        with self._lock:
            if self._served is None:
                self._theirs = theirs = self._find()
                self._served = self._serve(theirs)
                self._exchange(theirs, self._served)
            asked = Accelerated(self, self.installed())
            self._askers.append(asked)
        logger.info(asked)
        return asked

    def withdraw(self, asked: Accelerated) -> None:
        with self._lock:
            if asked in self._askers:
                self._askers.remove(asked)
                if not self._askers:
                    # Modules that were imported meanwhile hold ours, too.
                    self._exchange(self._served, self._theirs)
                    self._served = self._theirs = None

    def uninstall(self) -> None:
        with self._lock:
            for asked in self._askers.copy():
                asked.undo()

    def installed(self) -> tuple[str, ...]:
        """Return the names of the modules that hold ours now."""
        return tuple(dict.fromkeys(module.__name__ for module, _ in _held(self._served)))

    def _find(self) -> Attention:
        try:
            home, *_ = (importlib.import_module(name) for name in (self._home, *self._users))
            theirs = getattr(home, self.name)
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"{self.package}: expected {self.name} in {self._home}, got {self.package} {self.version()} without it"
            ) from error
        if not self._agrees(theirs):
            raise RuntimeError(
                f"{self.package}: expected a {self.name} that computes what ms_deform_attn does, got that of "
                f"{self.package} {self.version()}, which does not"
            )
        return theirs

    @torch.no_grad()
    def _agrees(self, theirs: Attention) -> bool:
        agreed = False
        for example in self._examples():
            try:
                wanted = theirs(*example)
            except Exception:
                continue  # a form of other versions
            found = self._ours(*example)
            if wanted.shape != found.shape or not torch.allclose(found, wanted, atol=1e-4):
                return False
            agreed = True
        return agreed

    def _serve(self, theirs: Attention) -> Attention:
        ours = self._ours

        @functools.wraps(theirs)
        def served(value: Tensor, *args: Any, **named: Any) -> Tensor:
            # A trace is made to run elsewhere, where there may be no dcn_plugin.
            if is_tracing() or value.device.type not in ("cpu", "cuda", "meta"):
                return theirs(value, *args, **named)
            return ours(value, *args, **named)

        return served

    @staticmethod
    def _exchange(old: Any, new: Any) -> None:
        for module, name in list(_held(old)):
            setattr(module, name, new)


def _held(function: Any) -> Iterator[tuple[ModuleType, str]]:
    """Yield where modules, the program's own among them, hold a function by a name."""
    if function is not None:
        for module in list(sys.modules.values()):
            if isinstance(module, ModuleType):
                for name, value in list(vars(module).items()):
                    if value is function:
                        yield module, name
