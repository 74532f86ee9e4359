"""Networks behind two pure functions, init and apply: the only folder that imports flax."""
