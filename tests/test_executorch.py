"""ExecuTorch computes what our layers do. The tests' environment does not have it, so this runs where it is installed.

Beside the tests, `scripts/runtimes_table.py --only executorch` runs it; `tests/errors/table_export.py` reaches the
comparison with a runtime of that name that computes zeros.
"""

import pytest
import torch
from torch import nn

from dcn_plugin.layers import DCNv1, DCNv2

pytest.importorskip("executorch")
from test_other_forms import draw, moved  # noqa: E402

from dcn_plugin.export.executorch import export_executorch, run_executorch  # noqa: E402


class Several(nn.Module):
    """Layers, and outputs that are integers or empty."""

    def __init__(self):
        super().__init__()
        self.first = DCNv2(8, 12, 3, padding=1, groups=2, offset_groups=4)
        self.second = DCNv1(12, 6, (2, 3), stride=(2, 1), padding=(0, 1, 2, 3), dilation=(1, 2), bias=False)

    def forward(self, x):
        out = self.second(self.first(x))
        return out, out.argmax(1), out[:, :0]


@pytest.mark.parametrize("partitioners", [None, ()], ids=["XNNPACK", "none"])
def test_executorch_agrees(tmp_path, partitioners):
    model = moved(Several())
    path = export_executorch(model, (draw(1, 8, 10, 12),), tmp_path / "sub/model.pte", partitioners=partitioners)
    assert [file.name for file in path.parent.iterdir()] == ["model.pte"]
    other = draw(1, 8, 10, 12).flip(3)
    with torch.no_grad():
        wanted = model(other)
    found = run_executorch(path, (other,))
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-4 * float(wanted[0].abs().max()))
    assert found[1].dtype == torch.int64 and found[2].shape == wanted[2].shape


def test_nothing_is_left_where_outputs_differ(tmp_path):
    with pytest.raises(ArithmeticError, match="outputs: expected to agree within 1e-30"):
        export_executorch(moved(DCNv2(8, 4, 3)), (draw(1, 8, 9, 9),), tmp_path / "m.pte", tolerance=1e-30)
    assert not list(tmp_path.iterdir())
