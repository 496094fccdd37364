"""Per-sample gradients as factors, streamed through the model one block at a time."""
