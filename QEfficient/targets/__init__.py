"""ONNX -> package -> session; one file per target."""
