"""How good and how honest predictions are: numbers, plots, and where results come from."""
