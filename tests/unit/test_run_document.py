import json
import math
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from bson import BSON
from hypothesis import given
from hypothesis import strategies as st

from sb3_mlflow_ckpt.errors import MirrorUnavailableError
from sb3_mlflow_ckpt.runs.document import checkpoint_entry, derived_status, finite, new_record, redact, redact_all
from sb3_mlflow_ckpt.runs.mongo_database import connect, decode, encode, redacted

NOW = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
# "\udc80" is how a byte of a file's name is held that is no text.
KEYS = st.text(alphabet="ab.$%0245DC8EIntuex\0 é\udc80", max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)


def beating(age: float, **fields: Any) -> dict[str, Any]:
    heartbeat = (NOW - timedelta(seconds=age)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"status": "running", "heartbeat_at": heartbeat, "heartbeat_seconds": 10.0, **fields}


@pytest.mark.parametrize(
    ("record", "status"),
    [
        (beating(119), "running"),
        (beating(121), "lost"),
        (beating(799, heartbeat_seconds=100.0), "running"),
        (beating(801, heartbeat_seconds=100.0), "lost"),
        (beating(121, heartbeat_seconds=None), "lost"),
        (beating(-5), "running"),
        (beating(10_000, status="completed"), "completed"),
        (beating(10_000, status="failed"), "failed"),
        (beating(10_000, status="interrupted"), "interrupted"),
        (beating(0, heartbeat_at=None), "running"),
        # By the clock of its own process: the last step lies long before the heartbeat.
        (beating(5, last_step_at=beating(124)["heartbeat_at"]), "running"),
        (beating(5, last_step_at=beating(126)["heartbeat_at"]), "stalled"),
        (beating(121, last_step_at=beating(999)["heartbeat_at"]), "lost"),
        (beating(5, heartbeat_seconds=100.0, last_step_at=beating(126)["heartbeat_at"]), "running"),
        (beating(5, last_step_at="edited"), "running"),
        (beating(5, status="failed", last_step_at=beating(999)["heartbeat_at"]), "failed"),
    ],
)
def test_only_a_running_run_is_lost_or_stalled(record: dict[str, Any], status: str) -> None:
    assert derived_status(record, NOW) == status


@pytest.mark.parametrize(
    ("uri", "on_disk", "state"),
    [("runs:/1/c", True, "mirrored"), ("runs:/1/c", False, "mirrored"), (None, True, "local"), (None, False, "pruned")],
)
def test_a_checkpoint_is_pruned_only_where_nobody_holds_it(uri: str | None, on_disk: bool, state: str) -> None:
    item = checkpoint_entry({"episode": 50}, path="/c/ep000050.zip", uri=uri, on_disk=on_disk)
    assert (item["episode"], item["path"], item["state"], item["on_disk"]) == (50, "/c/ep000050.zip", state, on_disk)


def test_a_new_record_is_strict_json_without_credentials() -> None:
    record = new_record(
        run_id="r",
        agent_id="a",
        name=None,
        algo="PPO",
        env_id=None,
        config={"uri": "mongodb://me:hunter2@host/db", "hooks": ["https://h/?token=hunter2"]},
        total_timesteps=None,
        parent=None,
        root_run_id=None,
        heartbeat_seconds=10.0,
        environment={"command": ["train", "--mongo-uri", "mongodb://me:hunter2@host"]},
    )
    text = json.dumps(record, allow_nan=False)
    assert "hunter2" not in text
    assert (record["root_run_id"], record["status"], record["attempt"]) == ("r", "running", 1)


@pytest.mark.parametrize(
    "uri",
    [
        "mongodb://u:secret/x@h/db",
        "mongodb+srv://u:secret@h/?a=b",
        "mongodb://u:secret@h/db",
        "mongodb://u:sec@ret@h/db",
        "http://secret@h",
        "postgresql+x://u:secret@h,i/d",
    ],
)
def test_redaction_removes_the_credentials_of_any_uri_in_a_text(uri: str) -> None:
    text = redact(f"connecting to {uri} failed")
    assert "secret" not in text
    assert "sec@" not in text
    assert "***@h" in text
    assert redact_all({"a": [uri, 1, None]}) == {"a": [redact(uri), 1, None]}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_a_number_that_json_cannot_hold_becomes_none(value: float | None) -> None:
    assert finite(value) is None


@given(JSON)
def test_any_json_survives_mongodb(value: Any) -> None:
    stored = BSON.encode({"value": encode(value)}).decode()
    assert decode(stored["value"]) == value


@given(st.dictionaries(KEYS, st.dictionaries(KEYS, st.none(), max_size=3), max_size=4))
def test_a_stored_key_means_nothing_to_mongodb(value: dict[str, Any]) -> None:
    stored = encode(value)
    for key in [*stored, *(inner for item in stored.values() for inner in item)]:
        assert key
        assert not key.startswith("$")
        assert not set(key) & {".", "\0"}


@pytest.mark.parametrize(
    ("stored", "shown"),
    [({"%int": "9" * 6000}, "9" * 6000), ({"%int": None}, None), ({"%text": "[1]"}, "[1]"), ({"%text": "{"}, "{"), ({"%int": "7"}, 7)],
    ids=["long", "none", "list", "torn", "number"],
)  # fmt: skip
def test_what_somebody_else_stored_in_a_form_of_ours_is_shown_as_it_is(stored: dict[str, Any], shown: Any) -> None:
    assert decode(stored) == shown


def test_numbers_that_json_cannot_hold_are_stored_as_null() -> None:
    assert encode({"a": [math.nan, math.inf, {"b": -math.inf}], "c": 1.0}) == {"a": [None, None, {"b": None}], "c": 1.0}


@pytest.mark.parametrize(
    "uri",
    [
        "foo://me:hunter2@host/db",
        "mongodb://me:hunter2@host:port/",
        "mongodb://me:pa/hunter2@host/db",
        "mongodb://me:pa@hunter2@host/db",
        "mongodb://me:pa?hunter2@host/db",
        "mongodb://me:hunter2@ho%41st/",
        "mongodb://me:hunter2@host/?tls=true&tlsCAFile=/no/such/file&tlsCertificateKeyFilePassword=hunter2",
    ],
)
def test_an_invalid_uri_is_an_error_without_its_credentials(uri: str) -> None:
    with pytest.raises(MirrorUnavailableError) as caught:
        connect(uri, "database")
    assert "hunter2" not in str(caught.value)
    assert "***@ho" in str(caught.value)
    # A traceback shows what an error was raised from, too.
    assert caught.value.__suppress_context__


def test_an_invalid_database_name_is_an_error_that_says_so() -> None:
    with pytest.raises(MirrorUnavailableError, match="database names cannot contain"):
        connect("mongodb://localhost", "a.b")


def test_a_uri_is_shown_without_options_since_they_may_be_secrets() -> None:
    assert (
        redacted("mongodb://u:p@a:1,b:2/db?replicaSet=x&tlsCertificateKeyFilePassword=y") == "mongodb://***@a:1,b:2/db"
    )
    assert redacted("mongodb://a:1/") == "mongodb://a:1/"


def test_reading_folders_needs_neither_a_database_client_nor_torch() -> None:
    code = (
        "import sys, sb3_mlflow_ckpt.runs.folder, sb3_mlflow_ckpt.runs.reader;"
        "print(sorted({'pymongo', 'bson', 'torch', 'stable_baselines3', 'mlflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_mongodb_mirror_needs_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys, sb3_mlflow_ckpt.mirrors.mongo;"
        "print(sorted({'torch', 'stable_baselines3', 'mlflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
