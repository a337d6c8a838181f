"""What models are made of: parameters, norms, rotation, attention, MLPs, and the decoder that puts them together."""
