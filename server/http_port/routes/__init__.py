"""Adds the routes of the HTTP port, a file for each purpose."""
