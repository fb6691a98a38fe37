"""Text with its uncertainty: the facade's part that scores and generates it."""
