"""Scheduling policies: which request is served first."""
