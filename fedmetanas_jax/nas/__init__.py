"""The search itself: relaxation, masks and genotypes. Knows no network."""
