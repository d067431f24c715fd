"""Compare the sidecar with envoyproxy/ratelimit for as long as one likes, or play one round again.

python -m differential --requests 50000 --odd-files 3000
python -m differential --seed 17 --file 3
"""

from __future__ import annotations

import sys

import click

from differential.build import SOURCE_VARIABLE, Unavailable, build
from differential.odd_yaml import judge
from differential.run import Outcome, play_round
from differential.services import redis_server


@click.command(context_settings={"show_default": True})
@click.option("--requests", default=1_000, help="Compare the answers to so many.")
@click.option("--first-seed", default=0, help="Of the first round; the next ones follow.")
@click.option("--odd-files", default=0, help="Let so many odd rules files be judged too.")
@click.option("--seed", type=int, help="Play this round only.")
@click.option("--file", "only", type=int, help="Play this file of each round only.")
@click.option("--odd-file", type=int, help="Let this odd file of the seed be judged, and nothing else be done.")
def main(
    requests: int, first_seed: int, odd_files: int, seed: int | None, only: int | None, odd_file: int | None
) -> None:
    """Random rules files and requests, to envoyproxy/ratelimit and to the sidecar in fixed windows.

    The exit code is 1 when they disagree in something that is not in the table of deliberate differences.
    """
    try:
        redis_server()
        reference = build()
    except Unavailable as unavailable:
        raise click.ClickException(f"{unavailable}. {SOURCE_VARIABLE} may name a checkout of it") from unavailable
    first = first_seed if seed is None else seed
    verdicts = judge(reference, first, range(odd_files) if odd_file is None else [odd_file])
    for text in verdicts.undeclared:
        click.echo(f"{text}\n")
    total = Outcome()
    number = first
    while total.requests < requests and odd_file is None:
        outcome = play_round(reference, number, only)
        for undeclared in outcome.undeclared:
            click.echo(f"{undeclared}\n")
        total.add(outcome)
        number += 1
        if seed is not None:
            break
    click.echo(
        f"{reference.version.name}: {total.requests:,} requests, {len(total.undeclared)} files with faults;"
        f" {verdicts.files:,} odd files, {len(verdicts.undeclared)} judged otherwise"
    )
    for name, count in (total.deliberate + verdicts.deliberate).most_common():
        click.echo(f"  {count:,} deliberate differences: {name}")
    sys.exit(1 if total.undeclared or verdicts.undeclared else 0)


if __name__ == "__main__":
    main()
