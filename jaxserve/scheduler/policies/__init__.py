"""Defines the scheduling policies, which order requests."""
