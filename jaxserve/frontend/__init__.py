"""Converts between a client's text and the engine's token ids: tokenizer, detokenizer, stop strings, requests."""
