"""What a layer is, and what it saw: no tracing."""
