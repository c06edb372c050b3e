"""Owns which MLflow run a training is copied to: the one that is there, or one that it makes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt.mirrors import naming
from sb3_mlflow_ckpt.mirrors.patience import REFUSALS, quick_requests, unavailable
from sb3_mlflow_ckpt.runs.document import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_DELETED = "deleted"
# The runs that trainings of this process write to.
_claimed: set[str] = set()


class TrackedRun:
    """The MLflow run of a training.

    Args:
        tracking_uri: MLflow's tracking URI; MLflow's own setting where it is None.
        experiment_name: The experiment of a new run; MLflow's own setting where it is None.
        run_id: An MLflow run to continue.
        parent_run_id: An MLflow run below which this one is made, whatever run is active in this process.

    Attributes:
        experiment_name: As given.
        run: The run, once it is found or made.
        owned: Whether it is ours to end.
        created: Whether it was made here.
        moved: Whether it is being sent to another server than the one that it was tracked at.
    """

    def __init__(
        self,
        tracking_uri: str | None,
        experiment_name: str | None,
        run_id: str | None,
        parent_run_id: str | None = None,
    ) -> None:
        self._tracking_uri = tracking_uri
        self.experiment_name = experiment_name
        self._given_run_id = run_id
        self._parent_run_id = parent_run_id
        self._client: MlflowClient | None = None
        self.forget()

    def forget(self) -> None:
        """Choose anew at the next use."""
        self._run_id: str | None = None
        self._below = self._parent_run_id
        self.run: Run | None = None
        self._experiment_found: str | None = None
        self.owned, self.created, self.moved = True, False, False

    @property
    def run_id(self) -> str | None:
        """The run's id, once it is known."""
        return self.run.info.run_id if self.run is not None else self._run_id

    @property
    def uri(self) -> str:
        """The tracking URI, with its credentials."""
        import mlflow

        return self._tracking_uri or str(mlflow.get_tracking_uri())

    @property
    def uri_elsewhere(self) -> str | None:
        """The tracking URI for another process; None for a database in the memory of this one."""
        uri = absolute_uri(self.uri)
        return None if uri.startswith("sqlite") and uri.partition(":///")[2] in ("", ":memory:") else uri

    @property
    def client(self) -> MlflowClient:
        """The client; it makes no request until it is used."""
        from mlflow import MlflowClient

        if self._client is None:
            self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    def choose(self) -> None:
        """Take the run that is active in this process or that `mlflow run` made, unless a training has it."""
        import mlflow

        if self._parent_run_id is not None:
            self._run_id = self._given_run_id
            return
        active = mlflow.active_run()
        chosen: str | None = self._given_run_id
        if chosen is None and active is not None:
            chosen, self.owned = active.info.run_id, False
        elif chosen is None:
            chosen = os.environ.get("MLFLOW_RUN_ID") or None
        if chosen in _claimed and chosen != self._given_run_id:
            chosen, self._below, self.owned = None, chosen, True
        if chosen is not None:
            _claimed.add(chosen)
        self._run_id = chosen

    def connect(self, record: Mapping[str, Any]) -> tuple[MlflowClient, Run]:
        """Return the client and the run: the chosen one, the record's, the one that its folder names, or a new one."""
        client = self.client
        if self.run is None:
            known = self._run_id or self._given_run_id or (record.get("mlflow") or {}).get("run_id")
            self.run = client.get_run(known) if known else self._run_of_folder(client, record)
            self.created = self.run is None
            if self.run is None:
                self.run = self._create(client, record)
        if self._experiment_found is None:
            # A server that was wiped gives a new run another experiment's number, but not its name.
            self._experiment_found = str(client.get_experiment(self.run.info.experiment_id).name)
        return client, self.run

    def describe(self) -> dict[str, Any]:
        """Return what a record says of the run, so that it is found again, or made again where it is gone."""
        info = self.run.info if self.run is not None else None
        return {
            "tracking_uri": redact(absolute_uri(self.uri)),
            "experiment_name": self._experiment_found or self.experiment_name,
            "experiment_id": info.experiment_id if info is not None else None,
            "run_id": info.run_id if info is not None else None,
        }

    def heal(self, record: Mapping[str, Any]) -> list[str]:
        """Find the run of a record, bring it back where it was deleted, make it anew where it is gone for good.

        Returns:
            What was done, a line each.
        """
        client = self.client
        known = (record.get("mlflow") or {}).get("run_id")
        self.run = (found_run(client, known) if known else None) or self._run_of_folder(client, record)
        self.run = self.run or _unnoted_run(client, record)
        if self.run is None:
            self.run, self.created = self._create(client, record), True
            made = f"the run is made as {self.run.info.run_id}"
            before = (record.get("mlflow") or {}).get("tracking_uri")
            self.moved = bool(known) and before not in (None, redact(absolute_uri(self.uri)))
            if self.moved:
                return [f"{made}: it was tracked at {before}, as {known}"]
            return [f"{made}: MLflow has no run {known} any more" if known else made]
        return self._restore(client, self.run)

    def _restore(self, client: MlflowClient, run: Run) -> list[str]:
        if run.info.lifecycle_stage != _DELETED:
            return []
        lines = []
        experiment = client.get_experiment(run.info.experiment_id)
        if experiment.lifecycle_stage == _DELETED:
            client.restore_experiment(experiment.experiment_id)
            lines.append(f"the experiment {experiment.name!r} was deleted: it is restored")
        # An experiment brings back the runs that went with it.
        self.run = client.get_run(run.info.run_id)
        if self.run.info.lifecycle_stage == _DELETED:
            client.restore_run(run.info.run_id)
            self.run = client.get_run(run.info.run_id)
        return [*lines, f"the run {run.info.run_id} was deleted: it is restored"]

    def _run_of_folder(self, client: MlflowClient, record: Mapping[str, Any]) -> Run | None:
        """Return the run that a folder is named after: a trainer may die before it has noted where it is tracked."""
        if not record.get("run_id"):
            return None
        found = run_of if self._parent_run_id is not None else found_run
        return found(client, str(record["run_id"]))

    def _create(self, client: MlflowClient, record: Mapping[str, Any]) -> Run:
        from mlflow.tracking.context.registry import resolve_tags

        tags = {str(key): redact(str(value)) for key, value in resolve_tags().items()}
        if record.get("run_id"):
            # Whoever is killed before it has noted the new run finds it by this.
            tags[naming.RUN_ID_TAG] = str(record["run_id"])
        if self._below is not None:
            tags[naming.PARENT_TAG] = self._below
        git = record.get("git")
        if git:
            tags.setdefault("mlflow.source.git.commit", git["commit"])
        return client.create_run(
            self._experiment_id(client),
            start_time=naming.milliseconds(record.get("started_at")),
            tags=tags,
            run_name=record.get("name"),
        )

    def experiment_id(self) -> str:
        """Return the id of the experiment that a new run belongs to; it is made if it is missing."""
        return self._experiment_id(self.client)

    def _experiment_id(self, client: MlflowClient) -> str:
        name = self.experiment_name
        if name is None:
            chosen = os.environ.get("MLFLOW_EXPERIMENT_ID")
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
            if chosen or not name:
                return chosen or "0"
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(client.create_experiment(name))
            except Exception:
                # Another run that starts at the same moment may have made it.
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        elif experiment.lifecycle_stage == _DELETED:
            # Its name cannot be given again while it is in MLflow's waste bin.
            client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)


def absolute_uri(uri: str) -> str:
    """Return a tracking URI that means the same from any folder: whoever syncs or repairs stands in another one."""
    scheme, separator, path = uri.partition(":///")
    if separator and scheme.startswith("sqlite") and path not in ("", ":memory:"):
        return f"{scheme}:///{Path(path).absolute()}"
    return str(Path(uri).absolute()) if ":" not in uri and uri != "databricks" else uri


def found_run(client: MlflowClient, run_id: str) -> Run | None:
    """Return a run, or None where MLflow has none of this id."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in REFUSALS:
            return None
        raise


def run_of(client: MlflowClient, run_id: str) -> Run | None:
    """Return the MLflow run of a training by the training's own id, whatever MLflow calls it.

    The two are the same until a run that was gone for good is made anew.
    """
    found = found_run(client, run_id)
    if found is not None or "'" in run_id:
        return found
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    named = client.search_runs(experiments, f"tags.`{naming.RUN_ID_TAG}` = '{run_id}'", max_results=1)
    return named[0] if named else None


def mlflow_id_of(run_id: str, tracking_uri: str | None) -> str | None:
    """Return what MLflow calls a training, by the training's own id; None where it has none of it.

    Raises:
        MirrorUnavailableError: It does not answer.
    """
    target = TrackedRun(tracking_uri, None, None)
    try:
        with quick_requests():
            found = run_of(target.client, run_id)
    except Exception as error:
        # mlflow raises its own, requests', sqlalchemy's and OS errors alike; they may quote the address's password.
        raise unavailable(error, target.uri) from None
    return str(found.info.run_id) if found is not None else None


def _unnoted_run(client: MlflowClient, record: Mapping[str, Any]) -> Run | None:
    """Return the run that a process made for a record and died before it could note it."""
    # Another training's run may have the same id, not the same start.
    found = run_of(client, str(record["run_id"])) if record.get("run_id") else None
    same = found is not None and found.info.start_time == naming.milliseconds(record.get("started_at"))
    return found if same else None
