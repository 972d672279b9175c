"""Who may ask for what, how much of it, and what was used: keys, limits, usage, audit."""
