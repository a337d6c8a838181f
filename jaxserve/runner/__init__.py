"""Runners execute step plans. Only this package (and what is below it) touches jax; `protocol` and `fake` do not."""
