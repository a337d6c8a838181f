"""Defines the compiled programs of a step, their inputs, and the closed set of them."""
