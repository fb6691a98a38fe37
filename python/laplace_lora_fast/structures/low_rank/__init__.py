"""The GGN by its leading directions: any number of examples."""
