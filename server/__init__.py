"""The gRPC interface: protos, service and server, and the client stubs."""
