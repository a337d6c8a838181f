"""Implements the gRPC interface: protos, service, server and client stubs."""
