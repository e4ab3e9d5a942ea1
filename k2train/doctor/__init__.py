"""What a person checks by hand before a run on a cluster, on every rank at once.

``machine``, ``network``, ``folders`` and ``data`` find out, ``verdicts`` judges what all ranks found, ``examine`` joins
them.
"""
