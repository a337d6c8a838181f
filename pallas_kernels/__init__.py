"""Kernels for JAX: plain arrays in, plain arrays out."""
