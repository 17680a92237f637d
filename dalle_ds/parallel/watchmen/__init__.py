"""The watchmen: a small process beside each training process that sees it die or hang and tells the others (`watch.py`).

They use the standard library alone and import each other by relative names: started as a package of its own, without torch
and the rest of this project, they are there in 60 ms and hold 10 MB. Being processes, they outlive the ones that they watch,
can kill them where they are stopped or hang, and are not held up by their locks and long calls.

    channel.py    what a watchman is told at its start, and how they talk
    progress.py   the last pulse of a training process, in memory that both share
    stacks.py     where the threads of a training process are
    parent.py     whether a training process lives
    launchers.py  whether those above it do
    logs.py       the files of RUN_DIR/logs, written by a thread of their own, for a disk may hang
    verdict.py    who is to blame, how to say so, and the status that all end with
    watchman.py   watches one training process
    chief.py      hears all watchmen and gives the verdict: part of rank 0's watchman
    main.py       the process

Messages are JSON objects, one on a line:

    chief to its training process   port: where it listens, and `token`, the secret of this run's watchmen
    training process to watchman    begin: connect to the chief at `host`, `port`; `who` is rank 0
                                    failed, timed out, cut off: a `Report`
                                    bye: done, and not to be watched any longer
    watchman to chief               join, bye; all kinds of `Report`; beat: a sign of life, with the training process's
                                    `Place`; stacks: the same, once its stacks are written
    chief to watchman               beat; dump: write the stacks; verdict: end now, with this `status`; end: to all when rank 0
                                    is done, no one watches from here on; to another one when it is
    watchman to training process    joined: it is connected to the chief; verdict, end; stop: behind a checkpoint, and `why`
"""
