"""Paged attention as Pallas kernels for the Triton backend: see `attention` for how the parts fit together."""
