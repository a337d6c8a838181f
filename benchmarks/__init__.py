"""Measurements of this repository's code. A regular package, so that no other package named `benchmarks` shadows it."""
