"""Rules files and folders that are read again when what they say changes.

Two things notice a change. The kernel (inotify, through watchfiles) tells within a moment that something happened in a
folder that matters: one in which an entry decides which text is read. Those are the folders of rules themselves, and
the parent of every file, folder and symbolic link on the way, so an editor's rename and Kubernetes' swap of `..data`
are seen. And every `CHECK_SECONDS` the files are looked at anyway: network and some overlay file systems send no
events, a process may be out of inotify instances, and a folder further up may be moved.

Either is only a hint: whether there is something to do is decided by the text. The look comes after the watch has
begun, so nothing that happens in between is missed (`watchfiles.awatch` would not say when that is, hence its backend
is used, as its documentation allows); and equal text (a `touch`, the noise of a busy folder) is left alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
from watchfiles._rust_notify import RustNotify, WatchfilesRustInternalError

from ratelimit_sidecar.config.document import MAX_BYTES
from ratelimit_sidecar.config.errors import ConfigError, Problem
from ratelimit_sidecar.config.regular_file import read_regular_file
from ratelimit_sidecar.config.rules_file import is_rules_file
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.rules_source.reloader import Reloader

CHECK_SECONDS = 30.0

QUIET_MS = 100
"""A change is over when nothing has happened for so long: a file is written in several steps, a folder file by file."""

MAX_QUIET_MS = 1_000
"""Where something always happens, a change is taken to be over after so long."""

_MAX_LINKS = 40
"""On the way to one file; the kernel follows no more either (path_resolution(7))."""

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Look:
    """What was there at one moment.

    Args:
        texts: a digest of every file's text, or why it has none, by path.
        folders: those that are worth watching.
    """

    texts: Mapping[Path, str]
    folders: frozenset[Path]


class RulesFiles:
    """Watches files of rules, and gives a reloader what they say.

    Args:
        paths: as `config.rules_file.load_rules` takes them.
        read: reads them; raises ConfigError when they cannot be used.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], Rules], *, check_seconds: float = CHECK_SECONDS
    ) -> None:
        self._paths = paths
        self._read = read
        self._check_ms = int(check_seconds * 1_000)
        self._known: Mapping[Path, str] = {}
        """The texts at the newest attempt to load them."""
        self._emptied: list[Path] = []
        """Folders that had files before, and had none then."""
        self._filled: set[Path] = set()
        """Folders in which files were found."""
        self._is_asked = False
        self._woken = threading.Event()

    def read_first(self) -> Rules:
        """The rules to start with.

        Raises:
            ConfigError: they cannot be used.
        """
        # Before they are read, so that a change meanwhile is one.
        self._note(look_at(self._paths).texts)
        return self._read()

    def _note(self, texts: Mapping[Path, str]) -> None:
        self._known = texts
        self._filled.update(file.parent for file in texts)
        there = texts.keys() | {file.parent for file in texts}
        self._emptied = [path for path in self._paths if path in self._filled and path not in there]

    def _read_again(self) -> Rules:
        """As `read`; a folder may have been empty from the start, but may not become so: that all its limits are gone
        is more likely a mishap."""
        if self._emptied:
            expected = "at least one file whose name ends in .yaml or .yml"
            fix = "to have no rules from now on, start the sidecar again"
            found = "no rules files any more"
            raise ConfigError([Problem(str(path), None, None, "", found, expected, fix) for path in self._emptied])
        return self._read()

    def ask(self) -> None:
        """Have them loaded again although their text may be the same."""
        self._is_asked = True
        self._woken.set()

    async def run(self, reloader: Reloader) -> None:
        """Load them whenever they have changed, until cancelled."""
        folders = (await self._look_at(reloader)).folders
        try:
            while True:
                with self._watching(folders, reloader) as watch:
                    folders = await self._follow(folders, watch, reloader)
        finally:
            # The thread that waits outlives its task otherwise.
            self._woken.set()

    @contextmanager
    def _watching(self, folders: frozenset[Path], reloader: Reloader) -> Iterator[RustNotify | None]:
        """Yields None when they cannot be watched."""
        watch: RustNotify | None = None
        try:
            watch = RustNotify(
                # Told to ignore those that it may not watch, it would ignore all errors.
                [str(folder) for folder in folders if os.access(folder, os.R_OK)],
                debug=False,
                force_polling=False,
                poll_delay_ms=0,
                recursive=False,
                ignore_permission_denied=False,
            )
            reloader.degraded_reason = ""
        except (OSError, WatchfilesRustInternalError) as error:
            every_seconds = self._check_ms / 1_000
            degraded_reason = f"not watched ({error}), only looked at every {every_seconds:g} s"
            if degraded_reason != reloader.degraded_reason:
                _log.warning("rules_not_watched", error=str(error), looked_at_every_seconds=every_seconds)
            reloader.degraded_reason = degraded_reason
        try:
            yield watch
        finally:
            if watch is not None:
                watch.close()

    async def _follow(self, folders: frozenset[Path], watch: RustNotify | None, reloader: Reloader) -> frozenset[Path]:
        """Load what has changed, until folders have to be watched anew, which are returned."""
        must_begin_anew = False
        while True:
            look = await self._look(reloader)
            if self._is_asked or look.texts != self._known:
                self._is_asked = False
                self._woken.clear()
                self._note(look.texts)
                await reloader.load(self._read_again)
            if must_begin_anew or look.folders != folders:
                return look.folders
            must_begin_anew = await asyncio.to_thread(self._wait, watch, folders)

    async def _look(self, reloader: Reloader) -> Look:
        """What is there; if it is new, once it stays the same, since a file may be half written."""
        look = await self._look_at(reloader)
        for _ in range(MAX_QUIET_MS // QUIET_MS):
            if look.texts == self._known:
                break
            await asyncio.sleep(QUIET_MS / 1_000)
            former, look = look, await self._look_at(reloader)
            if look.texts == former.texts:
                break
        return look

    async def _look_at(self, reloader: Reloader) -> Look:
        return await reloader.patiently(lambda: look_at(self._paths))

    def _wait(self, watch: RustNotify | None, folders: frozenset[Path]) -> bool:
        """Until something has happened, or it is time to look anyway; runs in a thread.

        Returns:
            True when the watch must begin anew.
        """
        if watch is None:
            self._woken.wait(self._check_ms / 1_000)
            self._woken.clear()
            # What was missing may be there again.
            return True
        try:
            happened = watch.watch(
                debounce_ms=MAX_QUIET_MS, step_ms=QUIET_MS, timeout_ms=self._check_ms, stop_event=self._woken
            )
        except WatchfilesRustInternalError as error:
            _log.warning("rules_watch_failed", error=str(error))
            # An error that stays must not keep a processor busy.
            self._woken.wait(MAX_QUIET_MS / 1_000)
            return True
        finally:
            self._woken.clear()
        if isinstance(happened, set):
            # What happens to a folder itself may give its name to another one, which nobody watches.
            return any(Path(path) in folders for _, path in happened)
        # Woken, it has forgotten what else has happened.
        return happened == "stop"


def look_at(paths: Iterable[Path]) -> Look:
    """What is there now. What cannot be read is left out, or its error is its text: nobody is blamed here."""
    texts: dict[Path, str] = {}
    folders: set[Path] = set()
    for path in paths:
        # What has been found until an error is enough to notice when it is gone.
        with suppress(OSError):
            folders.update(_folders_on(path))
            files = [path]
            if path.is_dir():
                folders.add(path.resolve())
                files = list(filter(is_rules_file, path.iterdir()))
            for file in files:
                texts[file] = _digest(file)
                folders.update(_folders_on(file))
    return Look(texts, frozenset(folders))


def _digest(file: Path) -> str:
    try:
        # More than that is refused, whatever it says.
        return hashlib.blake2b(read_regular_file(file, MAX_BYTES + 1)).hexdigest()
    except OSError as error:
        return str(error.strerror)


def _folders_on(path: Path) -> Iterator[Path]:
    """The folders that hold `path` and every symbolic link on the way to it."""
    at = Path("/")
    steps = list(reversed(path.absolute().parts))
    links = 0
    while steps:
        step = steps.pop()
        at = at.parent if step == ".." else at / step
        if at.is_symlink() and links < _MAX_LINKS:
            links += 1
            yield _existing(at.parent)
            steps += reversed(at.readlink().parts)
            at = at.parent
    yield _existing(at.parent)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there: its entries say when the rest comes."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder
