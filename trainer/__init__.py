"""The training engine: config, run directory, data, models, loop. Usable without the page: `python -m trainer`."""
