"""Serves the engine over gRPC."""
