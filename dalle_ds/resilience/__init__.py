"""Fault tolerance: what a run does about processes, hosts, launchers, updates and devices that fail.

    watch.py        a training process's side: starts its monitor, reports progress and errors, ends when told
    monitor.py      the monitor process of each rank
    coordinator.py  in that of rank 0: hears all monitors, finds the root cause, ends the run
    messages.py     how they talk
    failures.py     failure classes, the root cause among several reports, the log line
    processes.py    what a monitor sees of its training process: progress, stacks, state, launchers
    signals.py      SIGTERM, SIGUSR1, Ctrl-C: stop behind a checkpoint
    launcher.py     `python -m dalle_ds.launch`: deepspeed's child, waited for and asked for its status
    guard.py        NaN and loss spikes: when to roll back, and which data to leave out then
    stragglers.py   the rank that the others wait for

Half of it is the monitor, which has to tell a failure from its consequences on other ranks, from outside of the processes.

May import `parallel` and `config`; `training` and the launchers import it, `parallel` must not. `monitor.py`,
`coordinator.py`, `messages.py`, `failures.py` and `processes.py` import the standard library and each other only, since the
monitor process starts without torch.
"""
