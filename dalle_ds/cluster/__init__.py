"""Whether the processes of a launch are fit to train: `launchers/doctor.py cluster`, in about a minute.

`facts.py` asks for versions and clocks, `links.py` times collectives over every axis of the mesh, `disk.py` the folder of
runs, `trial.py` a small training; `checkup.py` puts them together and says what is wrong.
"""
