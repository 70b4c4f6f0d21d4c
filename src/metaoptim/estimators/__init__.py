"""How the gradient of the outer loss with respect to φ is obtained."""

from metaoptim.estimators.checkpointed import Checkpointed
from metaoptim.estimators.displacement import Displacement
from metaoptim.estimators.evolution import EvolutionStrategy, nres, pes, truncated_es
from metaoptim.estimators.finite_differences import FiniteDifferences
from metaoptim.estimators.guarded import Guarded, unguarded
from metaoptim.estimators.implicit import Implicit
from metaoptim.estimators.joint import Joint
from metaoptim.estimators.last_steps import LastSteps
from metaoptim.estimators.plain import judging
from metaoptim.estimators.sama import SAMA
from metaoptim.estimators.truncated import Truncated
from metaoptim.estimators.unroll import Unroll
from metaoptim.estimators.warp_objective import WarpObjective

__all__ = [
    "SAMA",
    "Checkpointed",
    "Displacement",
    "EvolutionStrategy",
    "FiniteDifferences",
    "Guarded",
    "Implicit",
    "Joint",
    "LastSteps",
    "Truncated",
    "Unroll",
    "WarpObjective",
    "judging",
    "nres",
    "pes",
    "truncated_es",
    "unguarded",
]
