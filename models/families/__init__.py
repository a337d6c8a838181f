"""The families of models that can be served, a file each."""
