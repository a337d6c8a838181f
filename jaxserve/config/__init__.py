"""Defines the settings of the engine and its servers, reads their gin files, and checks values."""
