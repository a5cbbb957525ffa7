"""What a primitive does: to the axis of the examples, to views of parameters, as a layer."""
