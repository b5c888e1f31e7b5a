"""In which form the weights lie in memory."""
