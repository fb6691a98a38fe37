"""Parts of the GPU report."""
