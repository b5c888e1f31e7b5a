"""Floor 4: stopping rules. A file is a method: history -> go on or stop (``StoppingRule``)."""
