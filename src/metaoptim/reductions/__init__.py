"""How the meta-gradients of tasks that pull in different directions become one."""

from metaoptim.core.reductions import Reduction
from metaoptim.reductions.conflict_aware import MGDA, PCGrad, UPGrad

__all__ = ["MGDA", "PCGrad", "Reduction", "UPGrad"]
