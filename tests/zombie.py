"""A process that holds a copy of a run folder and writes to MongoDB what it is told: `python zombie.py FOLDER URI DB`."""

from __future__ import annotations

import sys
from pathlib import Path

from journals import add_point, save

from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.metadata import timestamp_now
from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror


def main() -> None:
    folder, uri, database = sys.argv[1:]
    journal, mirror = RunJournal(RunFolder.at(Path(folder))), MongoMirror(uri, database)
    mirror.open(journal.record)
    for line in sys.stdin:
        word, *numbers = line.split()
        if word == "start":
            journal.start(journal.record)
        elif word == "save":
            save(journal, int(numbers[0]), numbers[1].encode())
        elif word == "point":
            add_point(journal, int(numbers[0]), by=int(numbers[1]))
        elif word == "beat":
            journal.update(heartbeat_at=timestamp_now(), beaten_by=numbers[0])
        mirror.replicate(journal)
        print("done", flush=True)


if __name__ == "__main__":
    main()
