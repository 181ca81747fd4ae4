"""The comparisons: every model trained the same way, judged on the same targets, and what the figures allow to say."""
