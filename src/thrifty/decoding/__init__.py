"""Ways to spend samples on questions, one file each."""
