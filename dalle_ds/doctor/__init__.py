"""Whether things are sound: `doctor.py env` (this machine), `cluster` (the processes of a launch), `data`, `checkpoint`.

cluster     options and the check of a launch, in about a minute; `checkup` says what of its `probes` and the `disk` is wrong
"""
