"""Reads the files of a checkpoint: its configuration, its tensors, its end tokens."""
