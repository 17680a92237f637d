"""Show a finished dVAE and transformer: OUT/pictures.png and OUT/report.html."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import report

if __name__ == "__main__":
    run_launcher(report)
