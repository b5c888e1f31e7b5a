"""Floor 4: metrics. A file is a method: what the objective measures of a model (``Metric``)."""
