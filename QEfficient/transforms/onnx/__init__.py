"""ONNX transforms: named, parametrised rewrites of an exported graph, queued before a target compiles it."""
