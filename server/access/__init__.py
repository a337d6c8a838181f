"""Decides who may call, and as whom."""
