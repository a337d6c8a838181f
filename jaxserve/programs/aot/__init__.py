"""Compiles programs ahead of time, for a device that need not be here, and keeps them in AOT bundles."""
