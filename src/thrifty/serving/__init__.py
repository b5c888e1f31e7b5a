"""An OpenAI-compatible proxy that answers within a budget for every key (docs/serving.md)."""
