"""Which CUDA kernels served the operators."""

import torch


def kernels_used() -> dict[str, str]:
    """Return the kernel that each operator last ran on CUDA, in any thread; empty without CUDA, or before a call.

    `plain` kernels serve every call. The fused ones, on tensor cores, serve half types; they are used where the
    environment variable `DCN_PLUGIN_CUDA_KERNELS` is `fused` (default `plain`), which every call looks at.

    Returns:
        Name of the operator -> name of the kernel, e.g. `{"deform_conv2d": "fused 128x128"}`.

    Example:
        >>> from dcn_plugin.ops import kernels_used
        >>> kernels_used()  # doctest: +SKIP
        {'deform_conv2d': 'plain', 'deform_conv2d_backward': 'plain'}
    """
    if not hasattr(torch.ops.dcn_plugin, "_cuda_kernels_used"):
        return {}
    lines = torch.ops.dcn_plugin._cuda_kernels_used().splitlines()
    return dict(line.split(": ", 1) for line in lines)
