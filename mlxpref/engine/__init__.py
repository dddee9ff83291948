"""A checkpoint and an adapter become logits, completions and log-probabilities."""
