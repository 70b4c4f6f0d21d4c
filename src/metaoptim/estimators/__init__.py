"""How the gradient of the outer loss with respect to φ is obtained."""

from metaoptim.estimators.checkpointed import Checkpointed
from metaoptim.estimators.displacement import Displacement
from metaoptim.estimators.evolution import EvolutionStrategy, nres, pes, truncated_es
from metaoptim.estimators.implicit import Implicit
from metaoptim.estimators.joint import Joint
from metaoptim.estimators.plain import judging
from metaoptim.estimators.truncated import Truncated
from metaoptim.estimators.unroll import Unroll

__all__ = [
    "Checkpointed",
    "Displacement",
    "EvolutionStrategy",
    "Implicit",
    "Joint",
    "Truncated",
    "Unroll",
    "judging",
    "nres",
    "pes",
    "truncated_es",
]
