"""A coverage-guided fuzzer over everything that reads what a stranger or an accident can write.

    python -m pip install -e '.[fuzz,test]'
    python tests/fuzz/fuzz.py metadata --seconds 300

It ends at the first input that brings about anything but an error of the house, and writes that input down.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]


def main() -> None:
    """Fuzz one target."""
    sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "fuzz")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import atheris

    with atheris.instrument_imports(include=["sb3_mlflow_ckpt", "zipfile", "yaml"]):
        import targets

        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("target", choices=sorted(targets.TARGETS))
        parser.add_argument("--seconds", type=int, default=60)
        parser.add_argument("--corpus", type=Path, help="where inputs that reach something new are kept")
        given = parser.parse_args()
        logging.disable(logging.CRITICAL)
        target = targets.TARGETS[given.target]
        seeds = target.seeds()
        # Its imports are made here, where they are instrumented, and before the watch is on.
        for seed in seeds:
            target.run(seed)

    def run(content: bytes) -> None:
        with targets.watched(content):
            target.run(content)

    with tempfile.TemporaryDirectory() as temporary:
        folder = given.corpus or Path(temporary, "corpus")
        folder.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds):
            (folder / f"seed-{number}").write_bytes(seed)
        words = Path(temporary, "words")
        escaped = ["".join(rf"\x{byte:02x}" for byte in token) for token in targets.TOKENS]
        words.write_text("".join(f'"{token}"\n' for token in escaped))
        limits = ["-timeout=20", "-rss_limit_mb=3000", "-max_len=65536", f"-artifact_prefix={Path.cwd()}/"]
        options = [f"-max_total_time={given.seconds}", f"-dict={words}", "-print_final_stats=1", *limits]
        atheris.Setup([sys.argv[0], str(folder), *options], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
