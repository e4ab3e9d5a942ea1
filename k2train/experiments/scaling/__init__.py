"""Scaling laws: what runs of small models say of the next larger one, and whether they have been right before.

``runs`` reads sweeps, ``cells`` takes the best settings of each size and number of tokens, ``law`` fits losses and
``trend`` settings, ``study`` tests the fits on the largest size and foretells a target; ``page``, ``record`` and
``figures`` show it. ``k2train scale`` is the command.
"""
