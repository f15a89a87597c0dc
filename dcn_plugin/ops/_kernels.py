"""Which kernels served the operators."""

from __future__ import annotations

import torch

DEVICES = ("cpu", "cuda")


def kernels_used(device: str | None = None, *, reasons: bool = False) -> dict[str, str]:
    """Return which kernels served each operator last, in any thread.

    The paths have three names. `portable` kernels serve every call. On the CPU the `tuned` ones serve nearly all, with
    the widest vectors of the processor. On CUDA there are `fused` ones of `deform_conv2d` (tensor cores: half types,
    and float32's forward where torch's switches allow convolutions TF32), of `ms_deform_attn` and of
    `deform_aggregate2d`, which serve where the environment variable `DCN_PLUGIN_CUDA_KERNELS` is `fused` (default
    `portable`), which every call looks at.

    Args:
        device: `"cpu"` or `"cuda"`: the calls on that alone; None: the last one on any.
        reasons: say in parentheses what kept a call from the tuned or the fused kernels: the argument, and what they
            expect of it.

    Returns:
        Name of the operator -> path, with what tells its kernels apart, e.g. `{"deform_conv2d": "fused 128x128"}`, or
        `{"deform_conv2d": "portable (input: expected Half or BFloat16)"}` with reasons; nothing for operators that have
        not run.

    Raises:
        ValueError: `device` is another one.

    Example:
        >>> import torch
        >>> from dcn_plugin.ops import kernels_used, ps_roi_pool
        >>> pooled = ps_roi_pool(torch.zeros(1, 4, 8, 8), torch.zeros(1, 5), output_dim=4, group_size=1, output_size=2)
        >>> kernels_used()["ps_roi_pool"]  # doctest: +SKIP
        'tuned x86-64-v4'
    """
    if device not in (None, *DEVICES):
        raise ValueError(f"device: expected 'cpu', 'cuda' or None, got {device!r}")
    logs = [f"_{name}_kernels_used" for name in ([device] if device else DEVICES)]
    lines = [getattr(torch.ops.dcn_plugin, log)() for log in logs if hasattr(torch.ops.dcn_plugin, log)]
    return latest(*lines, reasons=reasons)


def latest(*logs: str, reasons: bool = False) -> dict[str, str]:
    """Return the last kernels of each operator from the lines of logs, as `csrc/runtime/kernels.h` writes them."""
    notes = [line.split("\t") for log in logs for line in log.splitlines()]
    return {
        op: f"{kernels} ({reason})" if reasons and reason else kernels
        for op, _, kernels, reason in sorted(notes, key=lambda note: int(note[1]))
    }
