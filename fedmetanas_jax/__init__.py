"""Federated neural architecture search with model-agnostic meta-learning, in JAX."""
