"""A finished network in the formats of others: what `export.py` is made of."""
