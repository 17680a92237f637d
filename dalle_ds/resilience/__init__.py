"""Fault tolerance: what a run does about processes, hosts, launchers, updates and devices that fail.

    watch.py        a training process's side: starts its monitor, reports progress and errors, ends when told
    monitor.py      the monitor process of each rank
    coordinator.py  in that of rank 0: hears all monitors, finds the root cause, ends the run
    messages.py     failure classes, the log line, how monitors talk
    processes.py    what a monitor sees of its training process: progress, stacks, state, launchers
    signals.py      SIGTERM, SIGUSR1, Ctrl-C: stop after writing a checkpoint
    rollback.py     NaN and loss spikes: when to roll back, and which data to leave out then
    stragglers.py   the rank that the others wait for

More than half of it is the monitor, which has to tell a failure from its consequences on other ranks, from outside of the
processes. `monitor.py`, `coordinator.py`, `messages.py` and `processes.py` import the standard library and each other only,
since the monitor process starts without torch. `parallel` must not import this package.
"""
