import json
from pathlib import Path

import pytest

from sb3_mlflow_ckpt.errors import CheckpointCorruptError, IncompatibleCheckpointError
from sb3_mlflow_ckpt.metadata import parse_metadata

GOLDEN = Path(__file__).parents[1] / "golden" / "ep000050_metadata_v1.json"


def test_metadata_of_version_1_stays_readable_and_keeps_unknown_keys() -> None:
    document = {**json.loads(GOLDEN.read_text()), "finished_episodes": 50}
    assert parse_metadata(GOLDEN.read_bytes(), GOLDEN).to_json() == document


def test_the_documented_keys_come_first_in_their_order() -> None:
    keys = list(parse_metadata(GOLDEN.read_bytes(), GOLDEN).to_json())
    assert keys[:5] == ["episode", "run_id", "config", "timestamp", "extra_state"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b"[" * 100_000, "is not JSON"),
        (b"{}", "not valid at 'episode'"),
        (GOLDEN.read_bytes().replace(b'"episode": 50', b'"episode": -1'), "not valid at 'episode'"),
        (GOLDEN.read_bytes().replace(b'"bytes": 3', b'"bytes": "many"'), "not valid at 'files.0.bytes'"),
    ],
)
def test_metadata_that_is_not_valid_is_named(content: bytes, reason: str) -> None:
    with pytest.raises(CheckpointCorruptError, match=reason):
        parse_metadata(content, "ep000050_metadata.json")


def test_metadata_of_a_newer_version_asks_for_an_upgrade() -> None:
    newer = GOLDEN.read_bytes().replace(b'"format_version": 1', b'"format_version": 2')
    with pytest.raises(IncompatibleCheckpointError, match="Upgrade sb3-mlflow-ckpt"):
        parse_metadata(newer, "ep000050_metadata.json")
