"""Load on a server over gRPC: requests and when they arrive, the client that keeps the times, and their figures."""
