"""Pure tensor functions that every policy-optimisation method is composed of."""
