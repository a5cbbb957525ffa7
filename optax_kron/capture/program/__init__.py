"""A loss function as a graph: how its equations are read, and how it is evaluated."""
