"""What a tap has to see before its numbers may be believed."""
