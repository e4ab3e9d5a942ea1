"""What a run would take, from its config alone, without torch: parameters, memory, traffic, time and money.

``count`` knows the model, ``layout`` how it is cut over ranks, ``exchange`` Muon's part; ``memory``, ``communication``
and ``time`` make figures of them, ``estimate`` puts those together, ``search`` tries other layouts, ``page`` and
``picture`` show them. docs/plan.md holds the figures against real runs.
"""
