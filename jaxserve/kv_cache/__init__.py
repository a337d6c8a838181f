"""Keeps the accounts of the KV cache's pages. Imports no jax."""
