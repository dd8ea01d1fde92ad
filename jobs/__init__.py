"""What a person runs: `prepare.py`, `train.py`, `demo.py`, by hand or through `ray job submit`."""
