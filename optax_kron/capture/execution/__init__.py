"""A loss with its layers, run: what each saw, second moments, and the check on numbers."""
