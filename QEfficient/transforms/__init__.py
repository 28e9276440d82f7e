"""How a model is changed: PyTorch transforms before export, ONNX transforms after it."""
