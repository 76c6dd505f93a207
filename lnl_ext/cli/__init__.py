"""The ``lnl`` command: train, evaluate, probe and predict on a user's own images."""
