"""Owns what must hold after a fault: nothing that was committed is gone, nothing that was not is shown."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from typing import Any

from workloads import AGENT, CHECKPOINTS, EXPERIMENT, Context, Workload, restored_digest
from zygote import Report

from sb3_mlflow_ckpt.checkpoints import latest_checkpoint, list_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.errors import CheckpointError
from sb3_mlflow_ckpt.layout import TEMPORARY_PREFIX, RunFolder, model_episode
from sb3_mlflow_ckpt.runs.curve import read_curve
from sb3_mlflow_ckpt.runs.folder import FolderRuns


def examine(report: Report, workload: Workload, before: list[dict[str, Any]]) -> None:
    """Look at what a process left, as the next one does; `lost` is told for whatever should not be so.

    Args:
        report: Takes `lost`, and `recovered`: the seconds until the newest checkpoint was found, verified and loaded.
        workload: What the process did.
        before: What it told.
    """
    started = time.monotonic()
    newest = latest_checkpoint(CHECKPOINTS)
    held = restored_digest(newest) if newest is not None else None
    report(recovered=time.monotonic() - started)

    damaged = {episode for episodes in _told(before, "damaged") for episode in episodes}
    contents = defaultdict(set)
    for facts in _told(before, "saving"):
        contents[facts["run"], facts["episode"]].add((facts["steps"], facts["digest"]))
    shown = set()
    for path in list_checkpoints(CHECKPOINTS):
        try:
            metadata = verify_checkpoint(path)
        except CheckpointError as error:
            if model_episode(path.name) not in damaged:
                report(lost=f"a checkpoint is shown that is not whole: {error}")
            continue
        found = held if path == newest else restored_digest(path)
        known = contents[metadata.run_id, metadata.episode]
        if known and (metadata.num_timesteps, found) not in known:
            report(lost=f"{path} holds something that was never saved")
        shown.add((metadata.run_id, metadata.episode, metadata.num_timesteps))
    if not damaged:
        for lost in _missing(_told(before, "saved"), _told(before, "saving"), shown, workload.kept):
            report(lost=lost)
        _examine_records(report, before)


def _missing(
    saved: list[dict[str, Any]], saving: list[dict[str, Any]], shown: set[tuple[str, int, int]], kept: int
) -> list[str]:
    """Return what was told to be saved, must have been kept, and is not there."""
    lost = []
    for run in {facts["run"] for facts in saved}:
        order = _order([facts for facts in saved if facts["run"] == run])
        # One that was under way may have been committed, and may have made an older one go.
        further = _order([facts for facts in saving if facts["run"] == run])
        for episode in {*[*order][-kept:]} & {*[*further][-kept:]}:
            present = [steps for r, e, steps in shown if (r, e) == (run, episode)]
            if not present or max(present) < order[episode]:
                lost.append(f"episode {episode} of {run} was saved at {order[episode]} steps; there is {present}")
    return lost


def _order(commits: list[dict[str, Any]]) -> dict[int, int]:
    order: dict[int, int] = {}
    for facts in commits:
        order.pop(facts["episode"], None)
        order[facts["episode"]] = facts["steps"]
    return order


def _examine_records(report: Report, before: list[dict[str, Any]]) -> None:
    readable = {run["run_id"] for run in FolderRuns(CHECKPOINTS).list()}
    for run in {facts["run"] for facts in _told(before, "saved")} - readable:
        report(lost=f"the record of {run} cannot be read")
    points = defaultdict(set)
    for told in before:
        if "point" in told:
            points[told["run"]].add(told["point"])
    for run, steps in points.items():
        there = [point["num_timesteps"] for point in read_curve(RunFolder(CHECKPOINTS, AGENT, run))]
        if steps - set(there) or len(there) != len(set(there)):
            report(lost=f"the curve of {run} has {there}, {sorted(steps)} were written")


def settled(report: Report, workload: Workload) -> None:
    """Look at what the next process left when it had gone on to the end: what an undisturbed one leaves."""
    for folder in sorted(path for path in (CHECKPOINTS / AGENT).iterdir() if path.is_dir()):
        run = RunFolder(CHECKPOINTS, AGENT, folder.name)
        if not run.record.exists() and not [*folder.glob("ep*")]:
            continue  # It was killed between the folder and its record: there was nothing yet.
        left = [str(path) for path in folder.rglob("*") if path.name.startswith(TEMPORARY_PREFIX)]
        if left:
            report(lost=f"half-written files stay: {left}")
        paths = list_checkpoints(CHECKPOINTS, run_id=folder.name)
        needed = {entry.name for path in paths for entry in verify_checkpoint(path).files[1:]}
        there = {f"replay/{path.name}" for path in run.replay.iterdir()} if run.replay.is_dir() else set()
        # What a killed training does not need goes with the next prune or repair: it is resumed in another folder.
        killed = FolderRuns(CHECKPOINTS).get(folder.name)["status"] in ("running", "lost")
        if needed != there and not run.set_aside.exists() and not (killed and needed < there):
            report(lost=f"{folder.name} needs the chunks {sorted(needed)}, and has {sorted(there)}")
        named = {path.stem for path in paths}
        zips = {path.stem for path in folder.glob("ep*.zip")}
        if zips != named:
            report(lost=f"{folder.name} shows {sorted(named)}, and holds {sorted(zips)}")
        document = FolderRuns(CHECKPOINTS).get(folder.name)
        on_disk = {entry["episode"] for entry in document["checkpoint_paths"] if entry["on_disk"]}
        report(final=[folder.name[-1] if not workload.mirrored else "a", sorted(on_disk), document["status"]])


def mirrors(report: Report, context: Context) -> None:
    """Compare MLflow and MongoDB with the folders: everything is there, and once."""
    from mlflow import MlflowClient

    from sb3_mlflow_ckpt.mirrors import naming
    from sb3_mlflow_ckpt.runs.mongo import MongoRuns

    client = MlflowClient(context.mlflow)
    experiment = client.get_experiment_by_name(EXPERIMENT + context.database)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    folders = FolderRuns(CHECKPOINTS)
    documents = [folders.get(run["run_id"]) for run in folders.list()]
    known = {document["mlflow"]["run_id"] for document in documents}
    opened = [run.info.run_id for run in runs if run.info.run_id not in known]
    # MLflow names a run before there is a folder for it: a kill in between leaves one that `runs reap` settles.
    empty = all(run.info.status == "RUNNING" and not run.data.metrics for run in runs if run.info.run_id in opened)
    if len(opened) > 1 or not empty or any(client.list_artifacts(run_id) for run_id in opened):
        report(lost=f"MLflow has the runs {opened} beside {sorted(known)}")
    for document in documents:
        run_id = document["mlflow"]["run_id"]
        folder = RunFolder(CHECKPOINTS, AGENT, document["run_id"])
        sizes = {item.path.rpartition("/")[2]: item.file_size for item in client.list_artifacts(run_id, "checkpoints")}
        for path in list_checkpoints(CHECKPOINTS, run_id=folder.run_id):
            for file in (path, folder.metadata(verify_checkpoint(path).episode)):
                if sizes.get(file.name) != file.stat().st_size:
                    report(lost=f"MLflow has {sizes.get(file.name)} bytes of {file}")
        curve = [point["num_timesteps"] for point in read_curve(folder)]
        sent = [metric.step for metric in client.get_metric_history(run_id, naming.EPISODES_METRIC)]
        if sorted(sent) != sorted(curve):
            report(lost=f"MLflow has the points {sent} of {curve}")
        run = client.get_run(run_id)
        if run.info.status != "FINISHED":
            report(lost=f"the run is {run.info.status} in MLflow")
    if context.mongo:
        stored = MongoRuns(context.mongo, context.database)
        for document in documents:
            if _plain(stored.get(document["run_id"])) != _plain(document):
                report(lost=f"MongoDB's {stored.get(document['run_id'])} is not {document}")
            curve = read_curve(RunFolder(CHECKPOINTS, AGENT, document["run_id"]))
            if _plain(stored.curve(document["run_id"])) != _plain(curve):
                report(lost="MongoDB's curve is another one")
        stored.close()


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _told(reports: list[dict[str, Any]], key: str) -> list[Any]:
    return [report[key] for report in reports if key in report]


def sane_error(reports: list[dict[str, Any]]) -> str | None:
    """Return what is wrong with how an error of the disk was told, if anything is."""
    for told in reports:
        names, message = told.get("error") or told.get("failure"), told.get("message", "")
        if names and "CheckpointSaveError" not in names:
            return f"{names[0]} reached the training: {message}"
        if names and not any(word in message for word in ("writable folder", "clean up", "system's log", "ulimit -n")):
            return f"no remedy is named: {message}"
    return None
