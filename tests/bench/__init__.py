"""What does a request cost here, and next to others? See `run.py`."""
