"""Fault tolerance: what a run does about processes, hosts, launchers, updates and devices that fail.

    watch.py        a training process's side: starts its monitor, reports progress and errors, ends when told
    monitor.py      the monitor process of each rank, and the coordinator in that of rank 0
    failures.py     failure classes, the root cause among several reports, the log line
    processes.py    what a monitor sees of its training process: progress, stacks, state, launchers
    exceptions.py   the failure class of an exception
    signals.py      SIGTERM, SIGUSR1, Ctrl-C: stop behind a checkpoint
    launcher.py     `python -m dalle_ds.launch`: deepspeed's child, waited for and asked for its status
    guard.py        NaN and loss spikes: when to roll back, and which data to leave out then
    stragglers.py   the rank that the others wait for

May import `parallel` and `config`. `training` and the launchers import this room; `parallel` must not. `monitor.py`,
`failures.py` and `processes.py` import the standard library and each other only: the monitor process starts without torch.
"""
