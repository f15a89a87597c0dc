"""Models leave this package: as a folder, which is loaded again (`export_model`, `load_exported`), or as an ONNX file.

- `export_model` writes weights and a description, for timm, transformers and `load_exported`; no Lightning is needed.
- `onnx.export_onnx` writes a graph for other runtimes.
- `TunedModule.write_folder` of `dcn_plugin.finetune` calls `export_model` with what a trained module knows.
- `scripts/export.py` is the command line that turns such a folder, or a timm name, into a checked file of a graph.
"""

from .folder import export_model, load_exported
from .forms import FORMS, Form, register_form

__all__ = ["FORMS", "Form", "export_model", "load_exported", "register_form"]
