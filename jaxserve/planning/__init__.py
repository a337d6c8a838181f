"""Estimates a configuration's memory, bytes and seconds on a device before it runs."""
