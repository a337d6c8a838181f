"""What a step compiles: the programs, their inputs, and the closed set of them."""
