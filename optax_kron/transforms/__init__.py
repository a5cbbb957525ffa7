"""One optimizer per file: `scale_by_x` holds the mathematics, `x` chains it into an optimizer."""
