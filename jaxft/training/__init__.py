"""Training: the optimiser, the state, the jitted step, and the host loop around it. Receives models as functions."""
