"""How the answer in a text is read, one file each."""
