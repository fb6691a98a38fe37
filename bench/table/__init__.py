"""The honest table: every method, on several models, regimes of training and seeds, in and out of distribution."""
