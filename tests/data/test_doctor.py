"""`doctor.py data`: everything is read, and what is damaged is named."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from dalle_ds.data import store_writer
from dalle_ds.data.codes import CodesCache, cache_codes
from dalle_ds.data.embeddings import EmbeddingCache, cache_embeddings
from dalle_ds.data.prepare import PrepareOptions, prepare
from dalle_ds.doctor.data import DataOptions, inspect_data
from dalle_ds.errors import DataError
from dalle_ds.models import Clip
from tests.data.test_samples import FINGERPRINT, CornerCodes
from tests.processes import run_ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(folder_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data in several files, with codes."""
    out = tmp_path_factory.mktemp("whole") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "_FILE_BYTES", 20_000)
        patch.setattr(store_writer, "_BATCH_ROWS", 4)
        prepare(PrepareOptions(corpus="folder", source=str(folder_corpus), validation=0.2), str(out))
    cache_codes(CornerCodes(), out, views=2)
    return out


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def test_whole_data_is_found_whole(data: Path) -> None:
    inspection = inspect_data(DataOptions(str(data), pictures=10))
    splits = json.loads((data / "info.json").read_text())["splits"]
    assert inspection.faults == []
    assert [(entry.name, entry.rows, entry.unreadable) for entry in inspection.counts] == [
        *((split, rows, 0) for split, rows in splits.items()),
        *((f"codes/{FINGERPRINT[:16]}: {split}", rows, 0) for split, rows in splits.items()),
    ]
    assert [entry.decoded for entry in inspection.counts][:2] == [10, min(10, splits["validation"])]
    files = sum(entry.files for entry in inspection.counts)
    assert files == len(list(data.rglob("data-*.arrow")))
    assert sum(entry.decoded for entry in inspect_data(DataOptions(str(data), all=True)).counts) == 30


def test_codes_that_lie_elsewhere_are_read_too(data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "codes")
    cache_codes(CornerCodes(), data, views=2, codes_dir=tmp_path / "codes")
    options = DataOptions(str(data), codes=str(tmp_path / "codes"))
    assert len(inspect_data(options).counts) == 4 and not inspect_data(options).faults
    file = next((tmp_path / "codes").glob("*/train/*.arrow"))
    file.write_bytes(file.read_bytes()[:-1])
    assert any(str(file) in fault for fault in inspect_data(options).faults)


def test_every_kind_of_damage_is_named_and_its_rows_counted(data: Path) -> None:
    files = json.loads((data / "info.json").read_text())["shards"]["train"]
    assert len(files) >= 3
    paths = [data / "train" / entry["file"] for entry in files]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    content = bytearray(paths[2].read_bytes())
    content[content.index(b"IDAT") + 10] ^= 1  # one bit of one image
    paths[2].write_bytes(content)
    codes = next((data / "codes" / FINGERPRINT[:16] / "validation").glob("*.arrow"))
    stored = CodesCache.open(data, FINGERPRINT, "validation").codes(0, 0).astype("<u2").tobytes()
    codes.write_bytes(codes.read_bytes().replace(stored, bytes(len(stored))))
    inspection = inspect_data(DataOptions(str(data)))
    assert [fault.partition(":")[0] for fault in inspection.faults] == [
        f"{paths[0]} is missing; {files[0]['rows']} of its {files[0]['rows']} rows cannot be read",
        f"{paths[1]} has {files[1]['bytes'] - 1:,} bytes instead of {files[1]['bytes']:,}; "
        f"{files[1]['rows']} of its {files[1]['rows']} rows cannot be read",
        inspection.faults[2],
        inspection.faults[3].partition(":")[0],
    ]
    assert f"{paths[2]} is damaged (digest " in inspection.faults[2]
    assert inspection.faults[2].endswith(f"; 1 of its {files[2]['rows']} rows cannot be read")
    assert inspection.faults[3].startswith(f"{codes} is damaged (digest ")
    counts = {entry.name: entry for entry in inspection.counts}
    assert counts["train"].unreadable == files[0]["rows"] + files[1]["rows"] + 1
    assert counts["validation"].unreadable == 0
    assert counts[f"codes/{FINGERPRINT[:16]}: validation"].unreadable == 1


def test_the_command(data: Path) -> None:
    def doctor() -> subprocess.CompletedProcess[str]:
        return run_ranks("launchers/doctor.py", "data", data, "--all", "True")

    sound = doctor()
    assert sound.returncode == 0, sound.stderr
    assert "All of it is what was written." in sound.stdout and "train" in sound.stdout
    lost = next((data / "train").glob("*.arrow"))
    lost.unlink()
    damaged = doctor()
    assert damaged.returncode == 1
    assert f"DAMAGED: {lost}" in damaged.stdout.replace("\n", "") and "Traceback" not in damaged.stderr


def test_what_is_no_prepared_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a prepared data folder"):
        inspect_data(DataOptions(str(tmp_path)))


def test_embeddings_are_read_too(data: Path, clip: Clip) -> None:
    cache_embeddings(clip, data)
    counts = [entry for entry in inspect_data(DataOptions(str(data))).counts if entry.name.startswith("embeddings/")]
    assert [(entry.rows, entry.files) for entry in counts] == [(24, 4), (6, 3)]
    (folder,) = (data / "embeddings").iterdir()
    paths = folder / "moments.safetensors", next((folder / "validation" / "texts").iterdir())
    text = EmbeddingCache.open(data, clip.fingerprint, "validation").text(2, 1).tobytes()
    for path, part in zip(paths, (paths[0].read_bytes()[-8:], text), strict=True):
        path.write_bytes(path.read_bytes().replace(part, bytes(len(part))))
    inspection = inspect_data(DataOptions(str(data)))
    assert [fault.partition(" is damaged")[0] for fault in inspection.faults] == list(map(str, paths))
    assert [entry.unreadable for entry in inspection.counts if entry.name.startswith("embeddings/")] == [0, 1]
