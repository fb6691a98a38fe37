"""Passes over data, and fits made of them."""
