"""What is recorded of requests, steps and starts, and the metrics and pictures made of it."""
