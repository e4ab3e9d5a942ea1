"""Text from a trained model."""

from k2train.generate.sample import next_token, penalise, sample_text, sample_texts
from k2train.generate.scores import FullPasses, Remembering, Scores
from k2train.generate.text import TextStream, printable

__all__ = [
    "FullPasses",
    "Remembering",
    "Scores",
    "TextStream",
    "next_token",
    "penalise",
    "printable",
    "sample_text",
    "sample_texts",
]
