"""The engine loop and the messages by which a front end reaches it."""
