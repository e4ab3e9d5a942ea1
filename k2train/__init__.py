"""k2train: pretrain language models from scratch the way Kimi K2 was trained."""

__version__ = "0.1.0"
