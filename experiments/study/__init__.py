"""What experiments/tables.py, figures.py and report.py are made of: the paper's tables as runs that make them."""
