"""Text from a trained model, and how good it is at the text of others."""

from k2train.generate.sample import next_token, penalise, sample_text, sample_texts
from k2train.generate.scores import FullPasses, Remembering, Scores
from k2train.generate.suite import ANSWERS, Question, ask, longest_text, next_line_accuracy, parsed_share, valid_syntax
from k2train.generate.tasks import write_tasks
from k2train.generate.text import TextStream, printable

__all__ = [
    "ANSWERS",
    "FullPasses",
    "Question",
    "Remembering",
    "Scores",
    "TextStream",
    "ask",
    "longest_text",
    "next_line_accuracy",
    "next_token",
    "parsed_share",
    "penalise",
    "printable",
    "sample_text",
    "sample_texts",
    "valid_syntax",
    "write_tasks",
]
