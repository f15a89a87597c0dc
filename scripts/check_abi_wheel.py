"""Whether the installed wheel loads, calculates and differentiates; check_abi.sh runs it in each environment."""

from __future__ import annotations

import platform

import torch

from dcn_plugin import _extension, ops

assert "site-packages" in str(_extension.__file__), _extension.__file__
x, weight = torch.randn(1, 4, 9, 8, requires_grad=True), torch.randn(6, 4, 3, 3)
out = ops.deform_conv2d(x, torch.zeros(1, 18, 9, 8), weight, padding=1)
torch.testing.assert_close(out, torch.nn.functional.conv2d(x, weight, padding=1), atol=1e-5, rtol=1e-5)
out.sum().backward()
assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()
built = _extension.info()["torch"]
here = f"Python {platform.python_version()}, torch {torch.__version__}"
print(f"   {here}: a wheel that was built on torch {built} loads and runs")
