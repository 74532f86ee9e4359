"""The rival: the same client round in plain PyTorch, written as DARTS-style code usually is."""
