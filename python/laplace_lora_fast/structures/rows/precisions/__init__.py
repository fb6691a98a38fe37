"""What prior precisions make of rows: a sketch's equivalent, shared eigenbases, the evidence."""
