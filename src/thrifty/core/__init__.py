"""Floor 1, the currency: quantities, budgets, the ledger and the one rule.

Standard library, numpy and PyYAML only; nothing here loads torch.
"""
