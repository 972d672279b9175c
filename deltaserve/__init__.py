"""DeltaServe: serve many fine-tunes of one base model together, each as a compressed delta."""

__version__ = "0.1.0"
