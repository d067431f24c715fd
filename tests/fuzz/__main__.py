"""Fuzz for a while, or play one input again.

python -m fuzz --seconds 3600
python -m fuzz --replay .fuzz/crash-0123abcd
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from fuzz.build import CACHE, build
from fuzz.corpus import MAX_INPUT_BYTES, write_inputs

RSS_LIMIT_MB = 2_048
SLOWEST_INPUT_SECONDS = 60
"""An input takes milliseconds under the sanitizers; a process on a busy machine may be stopped for seconds."""


@click.command(context_settings={"show_default": True})
@click.option("--seconds", default=60, help="Fuzz for so long.")
@click.option("--seed", default=0, help="Of the fuzzer's choices; 0: another one each time.")
@click.option("--replay", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Play this input only.")
def main(seconds: int, seed: int, replay: Path | None) -> None:
    """Fuzz the HTTP/2 front end's connection under sanitizers.

    What it learns stays in .fuzz/corpus for the next time. The exit code is 1 when an input breaks a promise, crashes,
    or takes too long; that input is saved, and the command to play it again is printed.
    """
    packages = build()
    environment = {
        **os.environ,
        "LD_PRELOAD": str(packages / "asan_with_fuzzer.so"),
        "PYTHONPATH": os.pathsep.join((str(packages), str(CACHE.parent / "tests"), str(CACHE.parent))),
        # So that the sanitizer sees each of Python's allocations.
        "PYTHONMALLOC": "malloc",
        # Python itself keeps memory until its end. What grows with inputs reaches the limit on memory.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "fuzz.run", f"-rss_limit_mb={RSS_LIMIT_MB}", f"-timeout={SLOWEST_INPUT_SECONDS}"]
    if replay is not None:
        played = subprocess.run([*command, str(replay)], env=environment, check=False)
        sys.exit(1 if played.returncode else 0)
    seeds = CACHE / "seeds"
    corpus = CACHE / "corpus"
    write_inputs(seeds)
    corpus.mkdir(exist_ok=True)
    before = set(CACHE.iterdir())
    fuzzed = subprocess.run(
        [
            *command,
            *(f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={MAX_INPUT_BYTES}", "-len_control=0"),
            *("-print_final_stats=1", f"-report_slow_units={SLOWEST_INPUT_SECONDS}"),
            *(f"-artifact_prefix={CACHE}/", str(corpus), str(seeds)),
        ],
        env=environment,
        check=False,
    )
    if fuzzed.returncode == 0:
        return
    for file in sorted(set(CACHE.iterdir()) - before):
        click.echo(f'\nThe input is saved, and can be played again: make fuzz FUZZ="--replay {_relative(file)}"')
    sys.exit(1)


def _relative(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


if __name__ == "__main__":
    main()
