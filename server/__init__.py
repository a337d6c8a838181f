"""Serves the engine over gRPC and HTTP; holds the protos and the clients."""
