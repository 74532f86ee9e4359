"""A server and its clients as processes of their own, which talk over a network (docs/deployment.md)."""
