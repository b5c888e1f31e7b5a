"""Who answers: an endpoint, a model in this process, a recording."""
