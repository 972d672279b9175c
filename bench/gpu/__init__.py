"""Measurements that need a CUDA device; ``run.sh`` makes them all."""
