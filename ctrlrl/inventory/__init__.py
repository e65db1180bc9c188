"""Hindsight differentiable policy optimisation for inventory networks, its policies, and exact oracles."""
