"""Whether things are sound: `doctor.py env` (this machine), `cluster` (a launch), `data`, `checkpoint`, `weights`."""
