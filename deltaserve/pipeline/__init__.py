"""Input pipelines: a plan of operators, run with exact state. See docs/pipeline.md."""
