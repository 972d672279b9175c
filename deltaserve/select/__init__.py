"""Choosing a budget of samples from a pool: graph, utilities, solvers, policies, backends."""
