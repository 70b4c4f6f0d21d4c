"""One paper, one file. A new meta-optimizer is its file and one line here."""

from collections.abc import Callable

from metaoptim.algorithms.alfa import alfa as alfa
from metaoptim.algorithms.anil import anil as anil
from metaoptim.algorithms.article_maml import article_maml as article_maml
from metaoptim.algorithms.article_reptile import article_reptile as article_reptile
from metaoptim.algorithms.baseline_pp import baseline_pp as baseline_pp
from metaoptim.algorithms.boil import boil as boil
from metaoptim.algorithms.cavia import cavia as cavia
from metaoptim.algorithms.compose import compose as compose
from metaoptim.algorithms.fomaml import fomaml as fomaml
from metaoptim.algorithms.imaml import imaml as imaml
from metaoptim.algorithms.joint import joint as joint
from metaoptim.algorithms.lslr import lslr as lslr
from metaoptim.algorithms.maml import maml as maml
from metaoptim.algorithms.maml_plus_plus import maml_plus_plus as maml_plus_plus
from metaoptim.algorithms.matching_net import matching_net as matching_net
from metaoptim.algorithms.meta_curvature import meta_curvature as meta_curvature
from metaoptim.algorithms.meta_sgd import meta_sgd as meta_sgd
from metaoptim.algorithms.metaoptnet import metaoptnet as metaoptnet
from metaoptim.algorithms.mt_net import mt_net as mt_net
from metaoptim.algorithms.multi_task import multi_task as multi_task
from metaoptim.algorithms.pretrain import pretrain as pretrain
from metaoptim.algorithms.proto_maml import proto_maml as proto_maml
from metaoptim.algorithms.protonet import protonet as protonet
from metaoptim.algorithms.r2d2 import r2d2 as r2d2
from metaoptim.algorithms.reptile import reptile as reptile
from metaoptim.algorithms.simpleshot import simpleshot as simpleshot
from metaoptim.algorithms.t_net import t_net as t_net
from metaoptim.algorithms.warpgrad import warpgrad as warpgrad
from metaoptim.algorithms.zero_head_maml import zero_head_maml as zero_head_maml
from metaoptim.core.types import MetaOptimizer

ALGORITHMS: dict[str, Callable[..., MetaOptimizer]] = {
    "maml": maml,
    "fomaml": fomaml,
    "reptile": reptile,
    "meta_sgd": meta_sgd,
    "anil": anil,
    "imaml": imaml,
    "proto_maml": proto_maml,
    "protonet": protonet,
    "boil": boil,
    "lslr": lslr,
    "maml_plus_plus": maml_plus_plus,
    "cavia": cavia,
    "zero_head_maml": zero_head_maml,
    "meta_curvature": meta_curvature,
    "alfa": alfa,
    "t_net": t_net,
    "mt_net": mt_net,
    "matching_net": matching_net,
    "r2d2": r2d2,
    "metaoptnet": metaoptnet,
    "simpleshot": simpleshot,
    "pretrain": pretrain,
    "baseline_pp": baseline_pp,
    "joint": joint,
    "multi_task": multi_task,
    "warpgrad": warpgrad,
    "article_maml": article_maml,
    "article_reptile": article_reptile,
}
