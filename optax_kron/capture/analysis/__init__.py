"""What is found in a graph: where examples lie, how parameters are used, and its layers."""
