"""How a step is held in memory: one technique a file, one of each folder in a combination."""
