"""Everything between a client's text and the engine's token ids: tokeniser, detokeniser, stop strings, requests."""
