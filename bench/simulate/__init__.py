"""A load test without hardware: the engine's own decisions, driven by a clock and a cost model."""
