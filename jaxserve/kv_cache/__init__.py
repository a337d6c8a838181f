"""The bookkeeping of the KV cache's pages. Imports no jax."""
