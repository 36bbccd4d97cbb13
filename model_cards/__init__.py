"""Model cards that are evidence: built from a run's record, checked for claims it does not hold, and published."""

from model_cards.card import Card, build
from model_cards.curve import draw
from model_cards.hub import PublishedFile
from model_cards.linting import lint
from model_cards.publishing import Publication, check_access, publish

__all__ = ["Card", "Publication", "PublishedFile", "build", "check_access", "draw", "lint", "publish"]
