"""The class groups, class orders and task orders of the literature, against the published values and their rules.

The values here are written down on their own: neither the YAML files nor the code are read to make them.
"""

import random
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import CONF

from clrun.data import orders
from clrun.data.sources.cifar import SUPERCLASSES

pytestmark = pytest.mark.exact  # whole numbers, bytes and texts alone


def lines(text: str) -> dict[str, list[int]]:
    """Return {name: numbers} of lines "name number number ..."."""
    rows = [line.split() for line in text.strip().splitlines()]
    return {row[0]: [int(word) for word in row[1:]] for row in rows}


CIFAR100_SPLIT = lines("""
A 0 1 2 3 4 5 6 7 8 9
B 1 7 4 5 2 0 8 6 9 3
C 7 0 5 1 8 4 3 6 2 9
D 5 8 2 9 0 4 3 7 6 1
E 2 9 5 4 8 0 6 1 3 7
""")
CIFAR100_SUPERCLASS = lines("""
A 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19
B 15 12 5 9 7 16 18 17 1 0 3 8 11 14 10 6 2 4 13 19
C 17 1 19 18 12 7 6 0 11 15 10 5 13 3 9 16 4 14 2 8
D 11 9 6 5 12 4 0 10 13 7 14 3 15 16 8 1 2 19 18 17
E 6 14 0 11 12 17 13 4 9 1 7 19 8 10 3 15 18 5 2 16
""")
FIVE_DATASETS = lines("""
s0 2 0 1 3 4
s1 2 1 4 0 3
s2 2 4 1 3 0
s3 3 4 1 0 2
s4 0 3 1 4 2
l2p 2 1 0 4 3
""")
PERMUTED_MNIST = lines("""
s0 2 8 4 9 1 6 7 3 0 5
s1 2 9 6 4 0 3 1 7 8 5
s2 4 1 5 0 7 2 3 6 9 8
s3 5 4 1 2 9 6 7 0 3 8
s4 3 8 4 9 2 6 0 1 5 7
""")
TINY_IMAGENET_20 = lines("""
s0 10 18 16 14 0 17 11 2 3 9 5 7 4 19 6 15 8 1 13 12
s1 11 5 17 19 9 0 16 1 15 6 10 13 14 12 7 3 8 2 18 4
s2 7 6 17 8 19 15 13 0 3 9 14 4 10 12 16 5 11 18 2 1
s3 8 3 6 5 15 16 2 12 0 1 13 10 19 9 14 11 4 17 18 7
s4 17 19 10 14 5 18 16 11 4 8 6 0 13 1 2 15 12 3 9 7
""")
TINY_IMAGENET_40 = lines("""
s0 0 27 12 21 29 15 38 34 1 20 7 5 10 13 14 37 22 39 23 17 8 35 3 33 9 4 36 6 28 18 11 30 19 25 31 32 16 2 26 24
s1 23 2 11 1 37 32 5 9 17 29 34 20 38 21 27 22 10 33 18 35 39 14 26 19 13 12 0 15 3 6 25 24 30 28 31 7 16 4 36 8
s2 26 4 39 27 34 15 29 9 35 31 30 25 6 28 7 22 0 1 8 24 14 17 11 33 36 12 20 32 37 21 18 2 13 16 19 10 23 38 5 3
s3 5 14 18 3 26 31 27 35 13 9 2 1 10 32 11 21 16 19 28 33 20 12 25 24 29 39 22 6 7 17 36 38 0 4 30 23 8 34 37 15
s4 28 27 26 39 23 38 22 14 2 18 21 32 35 10 13 0 37 20 3 33 8 11 29 16 7 31 24 36 34 17 12 1 4 5 9 30 25 6 19 15
""")
ICARL_ROWS = lines("""
0- 68 56 78 8 23 84 90 65 74 76 40 89 3 92 55 9 26 80 43 38 58 70 77 1 85 19 17 50 28 53 13 81 45 82 6 59 83 16 15 44
40- 91 41 72 60 79 52 20 10 31 54 37 95 14 71 96 98 97 2 64 66 42 22 35 86 24 34 87 21 99 0 88 27 18 94 11 12 47 25
78- 30 46 62 69 36 61 7 63 75 5 32 4 51 48 73 93 39 67 29 49 57 33
""")
ICARL = [label for row in ICARL_ROWS.values() for label in row]
FINE_CLASSES = """
aquatic mammals: 4 30 55 72 95
fish: 1 32 67 73 91
flowers: 54 62 70 82 92
food containers: 9 10 16 28 61
fruit and vegetables: 0 51 53 57 83
household electrical devices: 22 39 40 86 87
household furniture: 5 20 25 84 94
insects: 6 7 14 18 24
large carnivores: 3 42 43 88 97
large man-made outdoor things: 12 17 37 68 76
large natural outdoor scenes: 23 33 49 60 71
large omnivores and herbivores: 15 19 21 31 38
medium-sized mammals: 34 63 64 66 75
non-insect invertebrates: 26 45 77 79 99
people: 2 11 35 46 98
reptiles: 27 29 44 78 93
small mammals: 36 50 65 74 80
trees: 47 52 56 59 96
vehicles 1: 8 13 48 58 90
vehicles 2: 41 69 81 85 89
"""


def shuffled_by_scikit_learn(count: int, seed: int) -> list[int]:
    shuffle = pytest.importorskip("sklearn.utils").shuffle
    return [int(k) for k in shuffle(np.arange(count), random_state=seed)]


def shuffled_by_python(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.seed(seed)
    random.shuffle(order)
    return order


def preset(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / "task_order" / f"{name}.yaml").read_text())


# Zheng et al. (ICCV 2023): the data sets by name, and those of order II as listed.
MTIL_I = ["aircraft", "caltech101", "cifar100", "dtd", "eurosat", "flowers", "food", "mnist", "pets", "cars", "sun397"]
MTIL_II = ["cars", "food", "mnist", "pets", "flowers", "sun397", "aircraft", "caltech101", "dtd", "eurosat", "cifar100"]
MTIL = {"i": list(range(11)), "ii": [MTIL_I.index(name) for name in MTIL_II]}

REGISTERS = {"technical_to_lay": [0, 1, 2, 3, 4], "lay_to_technical": [4, 3, 2, 1, 0], "mixed": [3, 0, 4, 1, 2]}

PRESETS = {
    "body_systems": REGISTERS,
    "cifar100_split": CIFAR100_SPLIT,
    "cifar100_superclass": CIFAR100_SUPERCLASS,
    "five_datasets": FIVE_DATASETS,
    "mtil": MTIL,
    "permuted_mnist": PERMUTED_MNIST,
    "tiny_imagenet_20": TINY_IMAGENET_20,
    "tiny_imagenet_40": TINY_IMAGENET_40,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_orders(name: str) -> None:
    node, published = preset(name), PRESETS[name]
    assert node["orders"] == published
    tasks = len(node["orders"][node["order"]])
    for order, expected in published.items():
        assert orders.preset(tasks, order=order, orders=node["orders"]) == expected


def test_every_preset_is_tested() -> None:
    files = {file.stem for file in (CONF / "task_order").glob("*.yaml") if "orders:" in file.read_text()}
    assert files == PRESETS.keys()


def test_the_mixed_order_of_registers_is_a_random_one() -> None:
    assert orders.random(5, seed=3) == REGISTERS["mixed"]


@pytest.mark.parametrize(
    ("published", "rule"),
    [
        (FIVE_DATASETS, shuffled_by_scikit_learn),
        (PERMUTED_MNIST, shuffled_by_scikit_learn),
        (TINY_IMAGENET_20, shuffled_by_python),
        (TINY_IMAGENET_40, shuffled_by_python),
    ],
)
def test_presets_follow_the_rule_that_made_them(published: dict[str, list[int]], rule: Any) -> None:
    for seed in range(5):
        assert rule(len(published["s0"]), seed) == published[f"s{seed}"]


def test_superclasses_are_the_published_partition() -> None:
    rows = [line.partition(": ")[2].split() for line in FINE_CLASSES.strip().splitlines()]
    expected = tuple(tuple(int(word) for word in row) for row in rows)
    assert SUPERCLASSES["superclass"] == expected
    assert sorted(label for group in expected for label in group) == list(range(100))


def test_class_order_1993_is_that_of_icarl() -> None:
    assert orders.numpy_permutation(100, 1993) == ICARL
    np.random.seed(1993)
    assert orders.numpy_permutation(200, 1993) == np.random.permutation(200).tolist()
    assert orders.numpy_permutation(10, 1993) == [4, 2, 7, 6, 0, 3, 5, 8, 9, 1]
    assert orders.numpy_permutation(50, 1993)[:12] == [43, 41, 23, 14, 13, 40, 42, 22, 16, 45, 17, 10]
    assert orders.numpy_permutation(200, 1993)[:12] == [168, 136, 51, 9, 183, 101, 171, 99, 42, 159, 191, 70]
    assert orders.numpy_permutation(300, 1993)[:10] == [169, 221, 146, 296, 92, 229, 49, 70, 126, 77]


def test_pythons_permutation_leaves_the_global_generator_alone() -> None:
    assert orders.python_permutation(200, 1) == shuffled_by_python(200, 1)
    random.seed(5)
    expected = random.random()
    random.seed(5)
    orders.python_permutation(10, 3)
    assert random.random() == expected
