"""The connection to Redis or Valkey, as configured: one server, the master that Sentinels name, or a Cluster.

Nothing is tried again here: callers have a back-off of their own, and may write everything twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from ratelimit_sidecar.config.sidecar_schema import FabricConfig, PersistenceConfig
from ratelimit_sidecar.persistence.redis_record import Keys

COMMAND_SECONDS: Final = 1.0
"""The time for a server to take a connection, and to answer."""

DEFAULT_PORT: Final = 6_379
DEFAULT_SENTINEL_PORT: Final = 26_379

_SHARDS: Final = 16

_MOVES: Final = 3
"""How often a Cluster may say in one call that a key is elsewhere now."""


class Connector:
    """Makes clients, as configured; each connects when it is first used.

    The next client of a Cluster is told of the nodes that the last one knew, too: the one in `url` may be gone.
    """

    def __init__(self, config: PersistenceConfig | FabricConfig) -> None:
        self._config = config
        self._cluster: RedisCluster | None = None
        self._known: list[tuple[str, int]] = []
        """The Cluster's nodes, as it last named them."""

    def __call__(self, on_connect: Callable[[], object] = lambda: None) -> Redis | RedisCluster:
        """Another client.

        Args:
            on_connect: called at each new connection, also at those that the library makes by itself.

        Raises:
            OSError: the file of the password cannot be read.
        """
        config = self._config
        assert config.url is not None
        url = urlsplit(config.url)
        user_info, _, hosts = url.netloc.rpartition("@")
        user, _, password = user_info.partition(":")
        options: dict[str, Any] = {
            "username": unquote(user) or None,
            "password": _password(config) or unquote(password) or None,
            "socket_timeout": COMMAND_SECONDS,
            "socket_connect_timeout": COMMAND_SECONDS,
            "protocol": 2,
        }

        async def greet(connection: AbstractConnection) -> None:
            on_connect()
            await connection.on_connect()

        if url.scheme == "unix":
            database = parse_qs(url.query).get("db", ["0"])[0]
            options |= {"db": int(database), "retry": _retry(0), "redis_connect_func": greet}
            return Redis(unix_socket_path=unquote(url.path), **options)
        if url.scheme == "rediss":
            options["ssl"] = True
            tls = config.tls
            if tls is not None:
                files = {"ssl_ca_certs": tls.ca, "ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
                options |= {name: str(path) for name, path in files.items() if path is not None}
        addresses = _addresses(hosts, DEFAULT_PORT if config.sentinel is None else DEFAULT_SENTINEL_PORT)
        if config.cluster:
            return self._connect_to_cluster(addresses, options, greet)
        options |= {"db": int(url.path.strip("/") or 0), "retry": _retry(0)}
        if config.sentinel is not None:
            not_theirs = ("username", "password", "db")
            of_sentinels = {name: value for name, value in options.items() if name not in not_theirs}
            sentinel = Sentinel(addresses, sentinel_kwargs=of_sentinels, **options)  # type: ignore[no-untyped-call]
            master: Redis = sentinel.master_for(config.sentinel, redis_connect_func=greet)
            return master
        [(host, port)] = addresses
        return Redis(host=host, port=port, redis_connect_func=greet, **options)

    def _connect_to_cluster(
        self, addresses: list[tuple[str, int]], options: dict[str, Any], greet: Callable[[AbstractConnection], object]
    ) -> RedisCluster:
        if self._cluster is not None:
            # It has none if it reached nobody.
            named = [(node.host, int(node.port)) for node in self._cluster.get_nodes()]
            self._known = named or self._known
        nodes = [ClusterNode(host, port) for host, port in dict.fromkeys([*addresses, *self._known])]
        self._cluster = RedisCluster(startup_nodes=nodes, retry=_retry(_MOVES), **options)
        # RedisCluster has no parameter for this function.
        self._cluster.connection_kwargs["redis_connect_func"] = greet
        return self._cluster


def keys(config: PersistenceConfig) -> Keys:
    """The names of the keys; in a Cluster of up to `_SHARDS` nodes each has one that tells whether it lost its data."""
    return Keys(config.prefix, shard_tags() if config.cluster else ())


@cache
def shard_tags() -> tuple[str, ...]:
    """Hash tags that are spread evenly over a Cluster."""
    tags: dict[int, str] = {}
    for number in count():
        tags.setdefault(key_slot(str(number).encode()) * _SHARDS // REDIS_CLUSTER_HASH_SLOTS, str(number))
        if len(tags) == _SHARDS:
            break
    return tuple(tags.values())


def _addresses(hosts: str, default_port: int) -> list[tuple[str, int]]:
    parts = [urlsplit(f"//{host}") for host in hosts.split(",")]
    return [(part.hostname or "", part.port or default_port) for part in parts]


def _password(config: PersistenceConfig | FabricConfig) -> str | None:
    if config.password_file is not None:
        return config.password_file.read_text().strip()
    return None if config.password_variable is None else os.environ.get(config.password_variable)


def _retry(times: int) -> Retry:
    return Retry(NoBackoff(), times)
