"""What is kept from the forward to the backward."""
