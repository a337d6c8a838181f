"""Settings of the engine and its servers, their gin files, and the checks that values must pass."""
