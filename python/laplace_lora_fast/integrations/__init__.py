"""Other libraries: the Trainer, laplace-torch, bayesian-lora. Each module imports its own; the package imports none."""
