"""Import paths that public scripts use."""
