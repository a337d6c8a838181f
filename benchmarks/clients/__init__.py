"""Unmodified clients of other projects against a server, each in an environment of its own."""
