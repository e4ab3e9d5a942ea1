"""Several runs: whether two are the same (``diff``), and many that differ on purpose (``sweep``)."""
