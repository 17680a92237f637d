"""Importing is quick and pulls in nothing that a user of the models does not need."""

from __future__ import annotations

import subprocess
import sys
import time


def modules_after(statement: str) -> tuple[set[str], float]:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {statement}; print(' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split()), time.perf_counter() - began


def test_import_takes_under_three_seconds() -> None:
    assert min(modules_after("import dalle_ds")[1] for _ in range(3)) < 3


def test_models_and_sampling_import_no_training_framework() -> None:
    loaded, _ = modules_after(
        "import dalle_ds, dalle_ds.models, dalle_ds.sampling, dalle_ds.config, dalle_ds.text.tokenizer"
    )
    assert not loaded & {"deepspeed", "wandb", "gradio", "datasets", "transformers", "matplotlib"}


def test_data_imports_no_datasets_before_it_is_used() -> None:
    loaded, _ = modules_after("import dalle_ds.data")
    assert not loaded & {"deepspeed", "datasets", "wandb"}
