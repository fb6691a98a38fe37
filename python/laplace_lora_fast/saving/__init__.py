"""What goes to disk: posteriors, what they belong to, and samples as adapters."""
