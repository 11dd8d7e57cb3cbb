"""The parts of the training benchmark: `python -m benchmarks.train`."""
