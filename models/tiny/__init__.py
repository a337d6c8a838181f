"""The default model: a small Llama trained by this project on tasks it generates itself."""
