"""Plan a run on a cluster: parameters, bytes by kind and moment, traffic by axis, projected time; or rank all layouts."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import plan

if __name__ == "__main__":
    run_launcher(plan)
