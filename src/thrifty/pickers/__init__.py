"""Floor 4: pickers. A file is a method: candidates -> rows in a budget (``contracts.Picker``)."""
