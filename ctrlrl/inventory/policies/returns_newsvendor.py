"""The newsvendor who may send back what is too much."""

from __future__ import annotations

from ctrlrl.inventory.policies.base import register
from ctrlrl.inventory.policies.quantile_newsvendor import QuantileNewsvendor


@register
class ReturnsNewsvendor(QuantileNewsvendor):
    """quantile_newsvendor with orders below zero: no policy to use, but a figure to compare with.

    What it sends can be negative, so every inventory position is exactly at its quantile; a simulator must step with
    its flows as they are, and not make them feasible first.

    Source: Alvo, Russo, Kanoria, Lee (arXiv:2306.11246), and the released code.

    Raises:
        PolicyError: As quantile_newsvendor.
    """

    admissible = False
