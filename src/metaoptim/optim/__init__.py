"""Rules as optimizers of torch's: those that were learned and kept in a file, and those of `metaoptim.rules`.

optimizer = metaoptim.optim.load("rule.safetensors")(model.parameters(), lr=1.0)
"""

from metaoptim.optim.factory import Factory, available, from_pretrained, from_rule, from_run, load
from metaoptim.optim.files import save
from metaoptim.optim.names import Named
from metaoptim.optim.optimizer import LearnedOptimizer

__all__ = ["Factory", "LearnedOptimizer", "Named", "available", "from_pretrained", "from_rule", "from_run", "load", "save"]
