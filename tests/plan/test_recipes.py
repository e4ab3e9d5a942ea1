"""Every recipe composes, fits on the machine it is meant for, and costs what docs/recipes.md says."""

from pathlib import Path

import pytest

from k2train.cli.options import group_options
from tests.plan.recipes import RECIPES, planned, table

SMALL = {"tiny", "k2-in-small", "mini"}  # no recipes: tests of an installation and of phases, and what reproduce trains


@pytest.mark.parametrize("words", RECIPES)
def test_a_recipe_fits(words):
    found = planned(words)
    assert found.fits
    assert all(phase.step.micro_batches >= 1 for phase in found.phases)


def test_every_experiment_is_a_recipe():
    named = {word.partition("=")[2] for words in RECIPES for word in words.split() if word.startswith("experiment=")}
    assert named | SMALL == set(group_options("experiment", []))


def test_the_page_has_the_plan_s_figures():
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    assert page.endswith("\n".join(table()) + "\n"), "run: python -m tests.plan.recipes docs/recipes.md"
