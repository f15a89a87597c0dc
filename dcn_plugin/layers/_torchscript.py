"""What `torch.jit.script` is told about layers that it cannot take."""

from typing import NoReturn


class NotScriptable:
    """Base of the layers, whose operators check their arguments in Python that TorchScript does not know."""

    def __prepare_scriptable__(self) -> NoReturn:
        # torch.jit.script asks every submodule before it compiles anything.
        raise NotImplementedError(
            f"torch.jit.script: expected modules that TorchScript can compile, got {type(self).__name__}: "
            "use torch.export, torch.compile or torch.jit.trace"
        )
