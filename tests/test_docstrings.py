"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import finetune
import model_cards
import pretrain
import trainworks

PACKAGES = (trainworks, pretrain, finetune, model_cards)
MODULES = [
    module.name
    for package in PACKAGES
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
]


def examples(name: str) -> list[doctest.DocTest]:
    module = importlib.import_module(name)
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name: str) -> None:
    for test in examples(name):
        assert doctest.DocTestRunner().run(test).failed == 0, test.name


def test_there_are_examples() -> None:
    assert sum(len(examples(name)) for name in MODULES) >= 20
