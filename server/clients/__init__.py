"""Calls a server: stubs for both ports, and the work of the command line client."""
