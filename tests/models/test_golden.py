"""The model trains as it did when it was computed plainly: a recorded curve of a small model, in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dalle_ds.nn.attention import blockwise
from tests.conftest import thorough
from tests.models.golden import STEPS, losses


@pytest.mark.parametrize(("logits", "blocks"), [(True, False), (False, True), *thorough((False, False))])
def test_losses_are_those_of_the_plain_model(logits: bool, blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`blocks` takes blockwise attention, which sequences as short as these are too short for in fp32."""
    monkeypatch.setattr(blockwise, "WORTHWHILE", 1.0 if blocks else blockwise.WORTHWHILE)
    recorded = json.loads((Path(__file__).parent / "golden_losses.json").read_text())
    found = losses(logits=logits)
    assert len(recorded) == len(found) == STEPS
    for step, (expected, now) in enumerate(zip(recorded, found, strict=True)):
        for name, value in expected.items():
            assert abs(now[name] - value) < 1e-4, f"{name} of update {step}"
    assert recorded[-1]["image_loss"] < recorded[0]["image_loss"] - 1  # it learns
