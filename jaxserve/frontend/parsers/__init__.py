"""Finds tool calls and reasoning in what models write: a state machine for each format, all behind one registry."""
