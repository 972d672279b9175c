"""Subset selection: graph, utilities, solvers, policies, backends."""
