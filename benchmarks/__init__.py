"""Speed and memory of training and sampling beside diffusers, see `scripts/benchmark.py`."""
