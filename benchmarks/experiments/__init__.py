"""What each way of batching and scheduling buys, on the engine and in simulation: one module, one command each."""
