"""Rules files and folders, which are read again when their content changes.

Two things notice a change. The kernel (inotify, through watchfiles) reports at once that something happened in a folder
whose entries decide which text is read. These are the folders of rules themselves, and the parent of every file, folder
and symbolic link on the way. So an editor's rename and Kubernetes' swap of `..data` are noticed. And every
`CHECK_SECONDS` the files are checked anyway: network and some overlay file systems send no events, a process may be out
of inotify instances, and a folder further up may be moved.

Both are only hints. The text decides whether rules are loaded; equal text (after a `touch`) is ignored. The files are
checked after the watch has started, so no change in between is missed. (`watchfiles.awatch` does not say when it has
started; so its backend is used, as its documentation allows.)
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
"""A change is complete when nothing has happened for this long: files are written in several steps, folders file by
file.
"""

MAX_QUIET_MS = 1_000
"""If something happens all the time, a change counts as complete after this long."""

_MAX_LINKS = 40
"""The most symbolic links on the way to one file; the kernel follows no more either (path_resolution(7))."""

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FilesState:
    """The files at one moment.

    Args:
        texts: by path, a digest of every file's text, or the reason why it cannot be read.
        folders: the folders to watch.
    """

    texts: Mapping[Path, str]
    folders: frozenset[Path]


class RulesFiles:
    """Watches rules files, and has a reloader load them when they change.

    Args:
        paths: as `config.rules_file.load_rules` takes them.
        read: reads them; raises ConfigError if they cannot be used.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], Rules], *, check_seconds: float = CHECK_SECONDS
    ) -> None:
        self._paths = paths
        self._read = read
        self._check_ms = int(check_seconds * 1_000)
        self._known: Mapping[Path, str] = {}
        """The texts at the last attempt to load them."""
        self._emptied_folders: list[Path] = []
        """Folders that had files once, and had none at the last attempt."""
        self._known_folders: set[Path] = set()
        """Folders that had files once."""
        self._limited_domains: set[str] = set()
        """Domains that had rules when they were last read."""
        self._is_asked = False
        self._woken = threading.Event()

    def read_first(self) -> Rules:
        """Read the rules for the start.

        Raises:
            ConfigError: they cannot be used.
        """
        # Look first, so that a change while reading is noticed.
        self._note(look_at(self._paths).texts)
        return self._read_limits()

    def _note(self, texts: Mapping[Path, str]) -> None:
        self._known = texts
        self._known_folders.update(file.parent for file in texts)
        there = texts.keys() | {file.parent for file in texts}
        self._emptied_folders = [path for path in self._paths if path in self._known_folders and path not in there]

    def _read_again(self) -> Rules:
        """Read the rules, unless a folder has lost all its files, or a domain that is still there all its rules, as in
        a file that is half written: that is more likely an accident than intended. One that was empty from the start is
        fine.
        """
        if self._emptied_folders:
            expected = "at least one file whose name ends in .yaml or .yml"
            fix = "to have no rules from now on, start the sidecar again"
            found = "no rules files any more"
            raise ConfigError(
                [Problem(str(path), None, None, "", found, expected, fix) for path in self._emptied_folders]
            )
        return self._read_limits()

    def _read_limits(self) -> Rules:
        """Read the rules, unless a domain has lost all of its own."""
        rules = self._read()
        limited = {domain for domain, _ in rules.names}
        emptied = sorted((self._limited_domains & rules.domains.keys()) - limited)
        if emptied:
            files = ", ".join(map(str, self._paths))
            fix = "to have none from now on, remove the domain, or start the sidecar again"
            raise ConfigError(
                [
                    Problem(files, None, None, f"domain {domain}", "no rules any more", "a rule", fix)
                    for domain in emptied
                ]
            )
        self._limited_domains = limited
        return rules

    def ask(self) -> None:
        """Load the rules again, even if their text is unchanged."""
        self._is_asked = True
        self._woken.set()

    async def run(self, reloader: Reloader) -> None:
        """Load the rules whenever they have changed, until cancelled."""
        folders = (await self._look_at(reloader)).folders
        try:
            while True:
                with self._watching(folders, reloader) as watch:
                    folders = await self._follow(folders, watch, reloader)
        finally:
            # Wake the waiting thread, which would outlive its task.
            self._woken.set()

    @contextmanager
    def _watching(self, folders: frozenset[Path], reloader: Reloader) -> Iterator[RustNotify | None]:
        """Watch the folders; yields None if that is impossible."""
        watch: RustNotify | None = None
        try:
            watch = RustNotify(
                # With ignore_permission_denied it would ignore all errors.
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
        """Load changes until the folders to watch are others; returns those."""
        must_watch_anew = False
        while True:
            look = await self._look(reloader)
            if self._is_asked or look.texts != self._known:
                self._is_asked = False
                self._woken.clear()
                self._note(look.texts)
                await reloader.load(self._read_again)
            if must_watch_anew or look.folders != folders:
                return look.folders
            must_watch_anew = await asyncio.to_thread(self._wait, watch, folders)

    async def _look(self, reloader: Reloader) -> FilesState:
        """Look at the files. If they have changed, wait until they stay the same, since one may be half written."""
        look = await self._look_at(reloader)
        for _ in range(MAX_QUIET_MS // QUIET_MS):
            if look.texts == self._known:
                break
            await asyncio.sleep(QUIET_MS / 1_000)
            former, look = look, await self._look_at(reloader)
            if look.texts == former.texts:
                break
        return look

    async def _look_at(self, reloader: Reloader) -> FilesState:
        return await reloader.read_in_thread(lambda: look_at(self._paths))

    def _wait(self, watch: RustNotify | None, folders: frozenset[Path]) -> bool:
        """Wait until something happens, or it is time to check anyway; runs in a thread.

        Returns:
            True if the watch must start anew.
        """
        if watch is None:
            self._woken.wait(self._check_ms / 1_000)
            self._woken.clear()
            # Watching may be possible again.
            return True
        try:
            happened = watch.watch(
                debounce_ms=MAX_QUIET_MS, step_ms=QUIET_MS, timeout_ms=self._check_ms, stop_event=self._woken
            )
        except WatchfilesRustInternalError as error:
            _log.warning("rules_watch_failed", error=str(error))
            # Wait, so that a lasting error does not keep a processor busy.
            self._woken.wait(MAX_QUIET_MS / 1_000)
            return True
        finally:
            self._woken.clear()
        if isinstance(happened, set):
            # A folder itself has changed: its name may belong to another folder now, which is not watched.
            return any(Path(path) in folders for _, path in happened)
        # "stop": when woken, the watch has lost other events.
        return happened == "stop"


def look_at(paths: Iterable[Path]) -> FilesState:
    """Look at the files now. Errors are no problem here: a file's error counts as its text, other errors are
    left out.
    """
    texts: dict[Path, str] = {}
    folders: set[Path] = set()
    for path in paths:
        # Ignore errors: what was found before one is enough to notice when the error goes away.
        with suppress(OSError):
            folders.update(_folders_on(path))
            files = [path]
            if path.is_dir():
                folders.add(path.resolve())
                files = list(filter(is_rules_file, path.iterdir()))
            for file in files:
                texts[file] = _digest(file)
                folders.update(_folders_on(file))
    return FilesState(texts, frozenset(folders))


def _digest(file: Path) -> str:
    try:
        # Larger files are refused, whatever their text.
        return hashlib.blake2b(read_regular_file(file, MAX_BYTES + 1)).hexdigest()
    except OSError as error:
        return str(error.strerror)


def _folders_on(path: Path) -> Iterator[Path]:
    """The folders that contain `path` and every symbolic link on the way to it."""
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
    """The folder, or the nearest existing one above it, in which it would appear."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder
