"""Runs the engine loop and defines the messages by which a front end reaches it."""
