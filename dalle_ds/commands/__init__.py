"""The commands, a module each: `dalle NAME`, `python -m dalle_ds NAME`, or `launchers/NAME.py`; `main` does the work."""
