"""Load tests of any OpenAI-compatible server, with tenants and fairness: docs/benchmarks.md."""
