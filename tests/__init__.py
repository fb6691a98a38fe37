"""A package, so that a `tests` some library installs (kronfluence does) is not taken for it."""
