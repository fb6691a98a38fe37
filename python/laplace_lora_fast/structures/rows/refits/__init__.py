"""The linearised model under its prior: its optimum, along precisions, and without each example."""
