"""Networks: pure ``torch.nn``, with the parameter names of the checkpoints."""
