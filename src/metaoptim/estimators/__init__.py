"""How the gradient of the outer loss with respect to φ is obtained."""

from metaoptim.estimators.displacement import Displacement
from metaoptim.estimators.unroll import Unroll

__all__ = ["Displacement", "Unroll"]
