"""What is trained on next, decided while training, one method a file."""
