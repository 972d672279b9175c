"""From a base and a fine-tune to a delta, and back to an ordinary checkpoint."""
