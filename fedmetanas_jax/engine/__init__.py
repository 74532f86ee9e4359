"""What runs a federated algorithm: rounds, evaluation, records, checkpoints."""
