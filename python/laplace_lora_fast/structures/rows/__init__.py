"""The exact GGN in row space."""
