"""One training step, seven models, in Kitsune and in every form of it that a PyTorch user can build: `--help` says how."""
