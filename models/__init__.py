"""Defines models, attention metadata and checkpoint loading, independently of requests."""
