"""Floor 4: pickers. A file is a method: candidates -> rows within a budget (``contracts.Picker``)."""
