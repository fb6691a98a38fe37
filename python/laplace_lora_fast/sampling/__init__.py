"""The linearised model by samples of its weights: for answers too large for a covariance, tokens and texts."""
