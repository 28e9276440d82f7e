"""Torch module -> ONNX on disk, with weights by reference into the checkpoint's own files."""
