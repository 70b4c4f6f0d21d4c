"""One paper, one file. A new meta-optimizer is its file and one line here."""

from collections.abc import Callable

from metaoptim.algorithms.anil import anil as anil
from metaoptim.algorithms.article_maml import article_maml as article_maml
from metaoptim.algorithms.article_reptile import article_reptile as article_reptile
from metaoptim.algorithms.compose import compose as compose
from metaoptim.algorithms.fomaml import fomaml as fomaml
from metaoptim.algorithms.imaml import imaml as imaml
from metaoptim.algorithms.maml import maml as maml
from metaoptim.algorithms.meta_sgd import meta_sgd as meta_sgd
from metaoptim.algorithms.protonet import protonet as protonet
from metaoptim.algorithms.reptile import reptile as reptile
from metaoptim.algorithms.warpgrad import warpgrad as warpgrad
from metaoptim.core.types import MetaOptimizer

ALGORITHMS: dict[str, Callable[..., MetaOptimizer]] = {
    "maml": maml,
    "fomaml": fomaml,
    "reptile": reptile,
    "meta_sgd": meta_sgd,
    "anil": anil,
    "imaml": imaml,
    "protonet": protonet,
    "warpgrad": warpgrad,
    "article_maml": article_maml,
    "article_reptile": article_reptile,
}
