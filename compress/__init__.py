"""Checkpoint to smaller checkpoint: distillation, pruning and 8-bit quantization."""
