"""From a loss function to its layers, and to what each of them saw."""
