"""Floor 4: scorers. A file is a method: rows -> scores, higher = keep (``contracts.Scorer``)."""
