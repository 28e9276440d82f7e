"""Training step -> ONNX: capture of the joint forward and backward graph and its lowering to standard operators."""
