"""Serves the engine over HTTP."""
