"""What experiments/search_quality.py is made of."""
