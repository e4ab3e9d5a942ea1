"""Text from a trained model."""

from k2train.generate.sample import next_token, printable, sample_text

__all__ = ["next_token", "printable", "sample_text"]
