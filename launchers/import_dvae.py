"""Import the dVAE that OpenAI released: encoder.pkl and decoder.pkl become an exported model, with none of their code run."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands.import_dvae import main

if __name__ == "__main__":
    run_launcher(main)
