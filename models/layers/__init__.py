"""Building blocks of models: parameters, norms, rotary embedding, attention, MLPs and the decoder that combines
them.
"""
