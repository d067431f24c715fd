"""Rules files, folders of them, and rules served over xDS, read into the tree that the limiter matches against.

Every problem of every file is found in one go. A file has the rules of one domain; where domains are merged, files of
one domain are read as if their descriptors stood in one, in the order of the files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from ratelimit_sidecar.config.bucket import BucketConfig
from ratelimit_sidecar.config.document import Document, load, unreadable
from ratelimit_sidecar.config.errors import ConfigError, Problem, quoted
from ratelimit_sidecar.config.reclamation import free_in_pieces, pieces_of_data, pieces_of_rules
from ratelimit_sidecar.config.resource import document_of_resource
from ratelimit_sidecar.config.rules_schema import RuleDefaults
from ratelimit_sidecar.config.rules_tree import Level, TreeReader, shown_capacity
from ratelimit_sidecar.limiter.http_mapping import HttpMapping
from ratelimit_sidecar.limiter.rules import Rule, RuleNode, Rules

DEFAULT_RULE_NAME = "bucket"
"""Name, in metrics, of the rule for descriptors that no other matches; a rule's own name has a dot in it."""

_SUFFIXES = (".yaml", ".yml")
_UNREAD_SUFFIX = ".md"
"""The suffix of files in a folder of rules that are certainly no rules."""
_STANDARD = RuleDefaults()


def load_rules(
    paths: Iterable[Path],
    *,
    default_rule: BucketConfig | None = None,
    defaults: RuleDefaults = _STANDARD,
    merge_domains: bool = False,
) -> Rules:
    """Read all rules.

    Args:
        paths: files, and folders as `find_rules_files` reads them.
        default_rule: the bucket for every descriptor that no rule matches; None leaves those unlimited.
        merge_domains: files may share a domain.

    Raises:
        ConfigError: every problem of every file.
    """
    files, problems = find_rules_files(paths)
    return _rules_of(_load_all(files, problems), problems, default_rule, defaults, merge_domains)


def rules_of_resources(
    resources: Mapping[str, Mapping[str, object]],
    *,
    default_rule: BucketConfig | None = None,
    defaults: RuleDefaults = _STANDARD,
    merge_domains: bool = False,
) -> Rules:
    """The rules of xDS resources: the same grammar and checks. Problems name the resource in place of the file.

    Args:
        resources: by name, each the plain data that a rules file of the same content holds.

    Raises:
        ConfigError: every problem of every resource.
    """
    documents = (document_of_resource(name, data) for name, data in resources.items())
    return _rules_of(documents, [], default_rule, defaults, merge_domains)


def find_rules_files(paths: Iterable[Path]) -> tuple[list[Path], list[Problem]]:
    """The files behind `paths`, each once, and what is wrong with the folders among them.

    Of a folder, these are the files whose names end in .yaml or .yml, in order of their names; there may be none.
    Subfolders, and files whose names begin with a dot, are left out: a Kubernetes ConfigMap keeps its older versions
        there.
    """
    files: list[Path] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            if not path.is_dir():
                files.append(path)
                continue
            files += sorted(entry for entry in path.iterdir() if is_rules_file(entry))
        except OSError as error:
            problems.append(unreadable(str(path), error, "a readable folder"))
    return list(dict.fromkeys(files)), problems


def is_rules_file(entry: Path) -> bool:
    """Whether an entry of a folder is read as a rules file."""
    # A dangling link passes, to be reported when it is read.
    return entry.suffix in _SUFFIXES and not entry.name.startswith(".") and not entry.is_dir()


def unread(folder: Path, paths: Collection[Path]) -> Iterator[Problem]:
    """Files in a folder of rules that may be meant as rules but are not read; envoyproxy/ratelimit reads all files. A
    path that is no folder has none.

    Args:
        paths: other paths that are read as rules.
    """
    for entry in _entries(folder):
        if entry.name.startswith(".") or entry.suffix == _UNREAD_SUFFIX or is_rules_file(entry) or entry in paths:
            continue
        if not entry.is_dir():
            expected, fix = "a name that ends in .yaml or .yml in a folder of rules", "rename it, or move it away"
            yield Problem(str(entry), None, None, "", f"the name {quoted(entry.name)}", expected, fix)
        elif any(is_rules_file(below) for below in _entries(entry)):
            expected, fix = "a folder without subfolders", "list both folders, in the configuration file under rules"
            yield Problem(str(entry), None, None, "", "rules in a subfolder", expected, fix)


def _entries(folder: Path) -> list[Path]:
    # An unreadable folder is reported where it is read.
    with suppress(OSError):
        return sorted(folder.iterdir())
    return []


def _load_all(files: Iterable[Path], problems: list[Problem]) -> Iterator[Document]:
    """The files that can be parsed; problems of the others are added to `problems`."""
    for file in files:
        try:
            yield load(file, must_be_regular=True)
        except ConfigError as error:
            problems += error.problems


def _rules_of(
    documents: Iterable[Document],
    problems: list[Problem],
    default_rule: BucketConfig | None,
    defaults: RuleDefaults,
    merge_domains: bool,
) -> Rules:
    settings = _DomainSettings()
    roots = _read_all(documents, problems, defaults, merge_domains, settings)
    if problems:
        pieces = pieces_of_rules(root for _, root in roots)
        roots.clear()
        free_in_pieces(pieces)
        raise ConfigError(problems)
    return Rules(
        domains=dict(roots),
        default_rule=None if default_rule is None else _default_rule(default_rule, defaults),
        override_window=defaults.override_window,
        override_consistency=defaults.consistency,
        override_charge=defaults.charge,
        all_or_nothing=frozenset(settings.all_or_nothing),
        http_mappings=settings.mappings,
        default_domain=settings.default,
    )


class _DomainSettings:
    """The settings of domains besides rules."""

    def __init__(self) -> None:
        self.all_or_nothing: set[str] = set()
        """Domains with all_or_nothing."""
        self.mappings: dict[str, HttpMapping] = {}
        self.default = ""
        """The default domain for requests over ext_authz; "" for none."""
        self._places: dict[str, str] = {}
        """By domain, where its mapping is, for problems."""

    def add(self, domain: str, reader: TreeReader, document: Document) -> Iterator[Problem]:
        """Add the settings of one document, and yield its contradictions with earlier ones."""
        if reader.all_or_nothing:
            self.all_or_nothing.add(domain)
        if reader.mapping is None:
            return
        if domain in self.mappings:
            found = f"a second mapping, beside that in {self._places[domain]}"
            yield document.problem(("ext_authz",), found, "one a domain", "put the descriptors of both into one")
            return
        self.mappings[domain] = reader.mapping
        self._places[domain] = document.place(("ext_authz",))
        if not reader.is_default:
            return
        if self.default:
            found = f"true, as in {self._places[self.default]} for {quoted(self.default)}"
            yield document.problem(("ext_authz", "default"), found, "it for one domain", "remove one of the two")
        else:
            self.default = domain


def _read_all(
    documents: Iterable[Document],
    problems: list[Problem],
    defaults: RuleDefaults,
    merge_domains: bool,
    settings: _DomainSettings,
) -> list[tuple[str, RuleNode]]:
    """The trees of all domains; problems of the documents are added to `problems`, and their settings besides rules
    to `settings`."""
    levels: list[tuple[str, Level]] = []
    domains: dict[str, Level] = {}
    first: dict[str, Document] = {}
    data: list[object] = []
    for document in documents:
        data.append(document.data)
        reader = TreeReader(document, defaults)
        domain = reader.read_domain()
        if domain in first and not merge_domains:
            found = f"{quoted(domain)}, which {first[domain].place(('domain',))} has already"
            fix = "put all descriptors of a domain into one file, or turn merge_domains on"
            problems.append(document.problem(("domain",), found, "another domain", fix))
        level = domains.get(domain) if merge_domains else None
        if level is None:
            level = Level()
            levels.append((domain, level))
        if domain:
            first.setdefault(domain, document)
            domains[domain] = level
        problems += settings.add(domain, reader, document)
        reader.read_descriptors(domain, level)
        problems += reader.problems
        # What was read is given back below.
        del document, reader
    first.clear()
    for _, level in levels:
        level.forget_places()
    pieces = pieces_of_data(data)
    data.clear()
    free_in_pieces(pieces)
    return [(domain, level.node()) for domain, level in levels]


def _default_rule(bucket: BucketConfig, defaults: RuleDefaults) -> Rule:
    return Rule(
        DEFAULT_RULE_NAME, bucket.limit(), shown_capacity(bucket), None, defaults.consistency, charge=defaults.charge
    )
