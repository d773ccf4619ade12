"""Will it fit? Memory of fine-tuning, predicted without a GPU (`predict`) and measured with one (`measure`)."""

from .cards import CARDS, Card, Verdict, Way, card_named, this_card, verdict
from .measurement import Measurement, measure, measuring
from .memory import Memory
from .planning import Plan, plan
from .prediction import predict

__all__ = ["CARDS", "Card", "Measurement", "Memory", "Plan", "Verdict", "Way", "card_named", "measure", "measuring",
           "plan", "predict", "this_card", "verdict"]  # fmt: skip
