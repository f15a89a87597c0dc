"""Models leave this package: a folder that timm and transformers read (`folder`), an ONNX file (`onnx`)."""
