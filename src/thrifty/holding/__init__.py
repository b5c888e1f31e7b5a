"""How memory techniques act on a real model."""
