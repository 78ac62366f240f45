"""Judging a circuit and a model: faithfulness curves, whether a task is solved, diagnostics of an alignment."""
