"""Floor 4: filters. A file is a method: which candidates remain (``contracts.Filter``)."""
