"""How much of the logits exists at a time."""
