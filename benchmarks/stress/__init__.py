"""Puts a running server under what it must survive: random messages, and long mixed load with faults."""
