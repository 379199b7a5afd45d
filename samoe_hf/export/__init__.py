"""Models without PyTorch: the parts of a frame's work as ONNX or `torch.export` programs, and a tracker over them."""
