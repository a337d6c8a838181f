"""Model families that can be served, one file each."""
