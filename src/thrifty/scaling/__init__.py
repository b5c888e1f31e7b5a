"""Floor 2: what a run will reach: learning-curve forecasts. No torch."""
