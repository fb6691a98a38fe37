"""Which columns of a Jacobian are kept, and how many."""
