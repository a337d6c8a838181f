"""Model definitions, attention metadata and checkpoint loading; knows nothing of requests."""
