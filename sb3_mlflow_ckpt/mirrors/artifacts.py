"""Owns reading checkpoints back from MLflow: `runs:/<id>/checkpoints/ep000100.zip` -> a local zip and its metadata."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from sb3_mlflow_ckpt.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from sb3_mlflow_ckpt.layout import (
    ARTIFACT_FOLDER,
    REPLAY_FOLDER,
    chunk_entry,
    entry_chunk,
    id_spellings,
    metadata_path,
    model_episode,
    model_path,
)
from sb3_mlflow_ckpt.leaving import temporary_folder
from sb3_mlflow_ckpt.metadata import CheckpointMetadata
from sb3_mlflow_ckpt.mirrors.naming import LATEST_TAG
from sb3_mlflow_ckpt.mirrors.patience import quick_requests, unavailable
from sb3_mlflow_ckpt.runs.document import redact
from sb3_mlflow_ckpt.verification import read_metadata, verify_checkpoint

logger = logging.getLogger(__name__)

SCHEME = "runs:/"


class Download(NamedTuple):
    """A checkpoint that came from MLflow: where it lies now, and the URI that names it."""

    path: Path
    uri: str


def download_checkpoint(uri: str, destination: Path, tracking_uri: str | None = None) -> Download:
    """Download one checkpoint, or a run's newest complete one that verifies.

    Args:
        uri: `runs:/<run id>/<artifact path of the zip>`, or `runs:/<run id>`.
        destination: An existing folder for the files.
        tracking_uri: MLflow's tracking URI; MLflow's own setting where it is None.

    Raises:
        CheckpointNotFoundError: The run or the artifact does not exist; the message says what does.
        CheckpointCorruptError: The artifact differs from its metadata.
        MirrorUnavailableError: MLflow does not answer.
    """
    run_id, _, artifact = uri.removeprefix(SCHEME).strip("/").partition("/")
    with quick_requests():
        run_id, artifacts, latest = _artifacts(uri, run_id, tracking_uri)
    address = tracking_uri or _default_uri()
    complete = _complete(artifacts, latest)
    if artifact:
        name = model_path(Path(artifact)).name
        in_place = Path(artifact).parent.as_posix() == ARTIFACT_FOLDER
        if in_place and name not in artifacts and _metadata_name(name) in artifacts:
            raise _missing(uri, run_id, artifact, address)
        if not in_place or name not in artifacts:
            raise CheckpointNotFoundError(uri, _what_is_there(complete))
        wanted = [name]
    else:
        wanted = complete[::-1]
    for name in wanted:
        try:
            return _download(run_id, name, artifacts, destination, address)
        except CheckpointError as error:
            if artifact:
                raise
            logger.warning("Passed over: %s", error)
    raise CheckpointNotFoundError(uri, _what_is_there(complete))


def newest_metadata(run_id: str, tracking_uri: str | None = None) -> CheckpointMetadata | None:
    """Return the metadata of a run's newest complete checkpoint in MLflow; None where it has none, or no such run.

    Raises:
        CheckpointCorruptError: It cannot be read.
        MirrorUnavailableError: MLflow does not answer.
    """
    names = complete_checkpoints(run_id, tracking_uri)
    return metadata_of(names[-1], tracking_uri) if names else None


def complete_checkpoints(run_id: str, tracking_uri: str | None = None) -> list[str]:
    """Return the URIs of a run's checkpoints that lie in MLflow with their metadata, the newest last.

    Raises:
        MirrorUnavailableError: MLflow does not answer.
    """
    try:
        with quick_requests():
            run_id, artifacts, latest = _artifacts(f"{SCHEME}{run_id}", run_id, tracking_uri)
    except CheckpointNotFoundError:
        return []
    return [f"{SCHEME}{run_id}/{ARTIFACT_FOLDER}/{name}" for name in _complete(artifacts, latest)]


def metadata_of(uri: str, tracking_uri: str | None = None) -> CheckpointMetadata:
    """Return the metadata of a checkpoint in MLflow.

    Args:
        uri: `runs:/<run id>/checkpoints/<zip>`, as `complete_checkpoints` has it.
        tracking_uri: MLflow's tracking URI; MLflow's own setting where it is None.

    Raises:
        CheckpointCorruptError: It cannot be read, or is not there any more.
        MirrorUnavailableError: MLflow does not answer.
    """
    run_id, _, artifact = uri.removeprefix(SCHEME).partition("/")
    name = _metadata_name(Path(artifact).name)
    with temporary_folder() as folder:
        _fetch(uri, run_id, name, {name}, folder, tracking_uri or _default_uri())
        return read_metadata(next(folder.rglob(name)))


def _complete(artifacts: set[str], latest: str) -> list[str]:
    """Return the zips that lie there with their metadata, the newest last."""
    complete = [name for name in artifacts if model_episode(name) is not None and _metadata_name(name) in artifacts]
    # What was sent last, then by episode: a run that went back to an older checkpoint has later, lower ones.
    return sorted(complete, key=lambda name: (name == latest, model_episode(name) or 0))


def _artifacts(uri: str, run_id: str, tracking_uri: str | None) -> tuple[str, set[str], str]:
    """Return the run's id as MLflow spells it, its checkpoints' files as metadata names them, and the newest zip."""
    import mlflow
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    address = tracking_uri or mlflow.get_tracking_uri()
    client = MlflowClient(tracking_uri=tracking_uri)
    for spelling in id_spellings(run_id)[::-1]:
        try:
            run = client.get_run(spelling)
            files = [
                *client.list_artifacts(spelling, ARTIFACT_FOLDER),
                *client.list_artifacts(spelling, f"{ARTIFACT_FOLDER}/{REPLAY_FOLDER}"),
            ]
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                continue
            raise unavailable(error, address) from None
        except Exception as error:
            raise unavailable(error, address) from None
        latest = Path(run.data.tags.get(LATEST_TAG, "")).name
        return spelling, {file.path.removeprefix(f"{ARTIFACT_FOLDER}/") for file in files if not file.is_dir}, latest
    raise CheckpointNotFoundError(uri, f"MLflow at {redact(address)} has no run {run_id!r}")


def _download(run_id: str, name: str, artifacts: set[str], destination: Path, address: str) -> Download:
    uri = f"{SCHEME}{run_id}/{ARTIFACT_FOLDER}/{name}"
    has_metadata = _metadata_name(name) in artifacts
    for file in (_metadata_name(name),) * has_metadata + (name,):
        _fetch(uri, run_id, file, artifacts, destination, address)
    path = next(destination.rglob(name))
    for entry in read_metadata(path).files[1:] if has_metadata else ():
        chunk = entry_chunk(entry.name)
        # What names another file is refused below; what another checkpoint of this download brought is there.
        if chunk is not None and not (path.parent / chunk_entry(chunk)).exists():
            # MLflow puts a file into the folder itself, without the artifact's own.
            chunk_folder = (path.parent / chunk_entry(chunk)).parent
            chunk_folder.mkdir(exist_ok=True)
            _fetch(uri, run_id, chunk_entry(chunk), artifacts, chunk_folder, address)
    verify_checkpoint(path)
    return Download(path, uri)


def _fetch(uri: str, run_id: str, file: str, artifacts: set[str], destination: Path, address: str) -> None:
    import mlflow.artifacts

    artifact = f"{ARTIFACT_FOLDER}/{file}"
    if file not in artifacts:
        raise _missing(uri, run_id, artifact, address)
    try:
        mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path=artifact, dst_path=str(destination), tracking_uri=address
        )
    except Exception as error:
        # mlflow raises its own, requests' and OS errors alike.
        if _is_gone(run_id, artifact, address):
            raise _missing(uri, run_id, artifact, address) from None
        raise unavailable(error, address) from None


def _is_gone(run_id: str, artifact: str, address: str) -> bool:
    """Tell whether MLflow answers, and does not list a file any more: retention may remove it while it is read."""
    from mlflow import MlflowClient

    try:
        with quick_requests():
            files = MlflowClient(address).list_artifacts(run_id, artifact.rpartition("/")[0])
    except Exception:
        return False  # It does not answer, which is what the caller is told.
    return artifact not in {file.path for file in files}


def _missing(uri: str, run_id: str, artifact: str, address: str) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        uri,
        f"MLflow at {redact(address)} lacks {artifact} of the run {run_id}",
        "Send it again with: sb3-mlflow-ckpt checkpoints sync, on the machine that has the run's folder, "
        "or resume another checkpoint",
    )


def _default_uri() -> str:
    import mlflow

    return str(mlflow.get_tracking_uri())


def _metadata_name(name: str) -> str:
    return metadata_path(Path(name)).name


def _what_is_there(complete: list[str]) -> str:
    if not complete:
        return "The run holds no complete checkpoints"
    return f"The run holds {', '.join(f'{ARTIFACT_FOLDER}/{name}' for name in complete[-5:])}"
