"""Starts and deploys servers beside other programs."""
