"""Floor 3: one pass of a model over data. Torch is imported inside the functions that compute."""
