"""Import the dVAE that OpenAI released, encoder.pkl and decoder.pkl, or a VQGAN, with none of their code run."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import import_dvae

if __name__ == "__main__":
    run_launcher(import_dvae)
