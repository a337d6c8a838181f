"""Records events of requests, steps and starts, and derives metrics and plots from them."""
