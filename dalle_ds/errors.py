"""The errors a user can act on. Each message says which field or file, what was found, and what to do."""

from __future__ import annotations


class DalleError(Exception):
    """Base of every error that dalle_ds raises on purpose; launchers print its message without a traceback."""


class ConfigError(DalleError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(DalleError, ValueError):
    """A corpus, image, caption or prepared data folder that is missing, broken or of the wrong shape."""


class DataChangedError(DataError):
    """Prepared data that is not what it was when the run began."""


class CheckpointError(DalleError, RuntimeError):
    """A run directory, checkpoint or exported model that is missing, incomplete or does not match."""


class TrainingError(DalleError, RuntimeError):
    """A run that cannot go on, such as a loss that is not finite."""


class Interrupted(DalleError):
    """A run that was told to stop and did, after writing a checkpoint; launchers end with `EXIT_REQUEUE`."""


EXIT_REQUEUE = 75
"""Status of a run that was stopped before its end, or lost a process, and goes on when the same command is given again
(EX_TEMPFAIL of sysexits.h). 0 is a run that is done, 1 one that failed and needs a person, 2 a wrong command line."""
