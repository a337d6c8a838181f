"""Serving simulated on a virtual clock: the real scheduler and page pool, costs in place of a device. No jax."""
