"""What the optimizer keeps, and when it uses a gradient up."""
