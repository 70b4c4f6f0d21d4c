"""The classes of CIFAR-100 that CIFAR-FS and FC100 hold out; all others are for training."""

from __future__ import annotations

HELD_OUT = {
    "cifar_fs": {
        "val": (
            "beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea "
            "shark television tractor"
        ),
        "test": (
            "baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper "
            "table telephone wardrobe whale woman worm"
        ),
    },
    "fc100": {
        "val": (
            "bear camel cattle chimpanzee crab elephant hamster kangaroo leopard lion lobster mouse rabbit shrew "
            "snail spider squirrel tiger wolf worm"
        ),
        "test": (
            "baby beaver bee beetle boy butterfly caterpillar cockroach dolphin fox girl man otter porcupine "
            "possum raccoon seal skunk whale woman"
        ),
    },
}
