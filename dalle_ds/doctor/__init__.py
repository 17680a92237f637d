"""Whether things are sound: `doctor.py env` (this machine), `cluster` (the processes of a launch), `data`, `checkpoint`."""
