"""One paper, one file. A new meta-optimizer is its file and one line here."""

from collections.abc import Callable

from metaoptim.algorithms.article_maml import article_maml
from metaoptim.algorithms.article_reptile import article_reptile
from metaoptim.algorithms.fomaml import fomaml
from metaoptim.algorithms.maml import maml
from metaoptim.algorithms.meta_sgd import meta_sgd
from metaoptim.algorithms.reptile import reptile
from metaoptim.types import MetaOptimizer

ALGORITHMS: dict[str, Callable[..., MetaOptimizer]] = {
    "maml": maml,
    "fomaml": fomaml,
    "reptile": reptile,
    "meta_sgd": meta_sgd,
    "article_maml": article_maml,
    "article_reptile": article_reptile,
}

__all__ = ["ALGORITHMS", "article_maml", "article_reptile", "fomaml", "maml", "meta_sgd", "reptile"]
