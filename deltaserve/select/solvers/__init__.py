"""The solvers. Each works on a ``Run`` and leaves its choice as SELECTED points."""
