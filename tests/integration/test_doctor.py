"""`doctor` finds what is really wrong, with the remedy, and changes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from journals import commit, start_run
from processes import python
from servers import SilentServer

from sb3_mlflow_ckpt import doctor
from sb3_mlflow_ckpt.layout import metadata_path
from sb3_mlflow_ckpt.runs.mongo_database import open_database

SECRET = "hunter2"


def examine(*words: object, cwd: Path) -> tuple[int, list[dict[str, str]]]:
    done = python("-m", "sb3_mlflow_ckpt", "doctor", "--json", *words, cwd=cwd)
    assert SECRET not in done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_whole_machine_with_its_servers_passes(
    tmp_path: Path, mlflow_uri: str, mongo_uri: str, mongo_database: str
) -> None:
    open_database(mongo_uri, mongo_database).client.close()
    (tmp_path / "checkpoints").mkdir()
    flags = ("--tracking-uri", mlflow_uri, "--mongo-uri", mongo_uri, "--mongo-db", mongo_database)
    code, findings = examine(*flags, cwd=tmp_path)
    assert code == 0, findings
    said = "\n".join(item["what"] for item in findings)
    for part in ("Python", "torch", "can be written", "locks", "hard links", "MLflow is", "indexes are", "MongoDB's clock"):
        assert part in said, part
    assert [*(tmp_path / "checkpoints").iterdir()] == []


def test_servers_that_do_not_answer_fail_within_seconds_and_show_no_password(
    tmp_path: Path, silent_server: SilentServer
) -> None:
    address = f"me:{SECRET}@127.0.0.1:{silent_server.port}"
    code, findings = examine("--tracking-uri", f"http://{address}", "--mongo-uri", f"mongodb://{address}", cwd=tmp_path)
    assert code == 1
    failed = [item for item in findings if item["status"] == "FAIL"]
    assert [item["what"].split()[0] for item in failed] == ["MLflow", "MongoDB"]
    assert all("--start-offline" in item["remedy"] for item in failed)


def test_damage_lost_runs_and_what_mlflow_lacks_are_named_with_their_commands(tmp_path: Path) -> None:
    journal = start_run(tmp_path, "run", mirrors=["MLflow"])
    journal.add_saved(commit(journal.folder, 1))
    journal.update(heartbeat_at="2020-01-01T00:00:00.000Z")
    os.utime(journal.folder.record, (0, 0))
    journal.close()
    metadata_path(journal.folder.model(2)).write_text("{")
    before = {path.name: path.read_bytes() for path in journal.folder.path.iterdir()}
    findings = [*doctor.runs(tmp_path)]
    assert [finding.status for finding in findings] == ["FAIL", "warn", "warn"]
    commands = ["checkpoints repair", "runs reap", "checkpoints sync"]
    assert all(command in finding.remedy for command, finding in zip(commands, findings, strict=True))
    assert {path.name: path.read_bytes() for path in journal.folder.path.iterdir()} == before


def test_a_folder_that_is_a_file_fails_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (finding,) = doctor.folder(tmp_path / "file")
    assert finding.status == "FAIL"
    assert "--checkpoint-dir" in finding.remedy


def test_a_disk_that_is_too_small_for_what_is_kept_fails(tmp_path: Path) -> None:
    journal = start_run(tmp_path, "run")
    metadata = commit(journal.folder, 1)
    journal.close()
    huge = metadata.to_json()
    huge["files"][0]["bytes"] = 10**17
    journal.folder.metadata(1).write_text(json.dumps(huge))
    assert "need" in next(finding.what for finding in doctor.folder(tmp_path) if finding.status == "FAIL")


def test_a_package_that_is_out_of_its_range_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["click>=999,<1000", "no-such-thing>=1"])
    found = [finding for finding in doctor.versions() if finding.status != "ok"]
    assert [finding.status for finding in found] == ["warn", "FAIL"]
    assert found[0].remedy == "python -m pip install 'click<1000,>=999'"
