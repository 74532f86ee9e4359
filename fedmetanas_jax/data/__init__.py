"""Where the images come from, which client holds which, and how they are augmented."""
