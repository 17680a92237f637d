"""Look at what a run has left behind, at prepared data, or at what runs would be on, and say whether it is sound."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import doctor

if __name__ == "__main__":
    run_launcher(doctor)
