from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SyncRequest(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNDECIDED: _ClassVar[SyncRequest]
    RECENT: _ClassVar[SyncRequest]
    EVERYTHING: _ClassVar[SyncRequest]
UNDECIDED: SyncRequest
RECENT: SyncRequest
EVERYTHING: SyncRequest

class Frame(_message.Message):
    __slots__ = ("hello", "deltas", "ack", "ping", "pong", "goodbye", "status", "digest", "summary", "pull", "payments")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    PAYMENTS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    deltas: Deltas
    ack: Ack
    ping: Ping
    pong: Pong
    goodbye: Goodbye
    status: Status
    digest: Digest
    summary: Summary
    pull: Pull
    payments: Payments
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., deltas: _Optional[_Union[Deltas, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., status: _Optional[_Union[Status, _Mapping]] = ..., digest: _Optional[_Union[Digest, _Mapping]] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ..., pull: _Optional[_Union[Pull, _Mapping]] = ..., payments: _Optional[_Union[Payments, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "node", "region", "incarnation", "version", "membership", "gateway")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    node: str
    region: str
    incarnation: int
    version: str
    membership: Membership
    gateway: bool
    def __init__(self, protocol: _Optional[int] = ..., node: _Optional[str] = ..., region: _Optional[str] = ..., incarnation: _Optional[int] = ..., version: _Optional[str] = ..., membership: _Optional[_Union[Membership, _Mapping]] = ..., gateway: _Optional[bool] = ...) -> None: ...

class Membership(_message.Message):
    __slots__ = ("epoch", "members")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, epoch: _Optional[int] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("node", "weight")
    NODE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    node: str
    weight: int
    def __init__(self, node: _Optional[str] = ..., weight: _Optional[int] = ...) -> None: ...

class Deltas(_message.Message):
    __slots__ = ("sequence", "origins", "buckets", "ends_full_state", "trace", "acknowledged", "ack_delay_ms", "overtaken")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ORIGINS_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FULL_STATE_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    ACK_DELAY_MS_FIELD_NUMBER: _ClassVar[int]
    OVERTAKEN_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    origins: _containers.RepeatedCompositeFieldContainer[Origin]
    buckets: _containers.RepeatedCompositeFieldContainer[BucketDelta]
    ends_full_state: bool
    trace: bytes
    acknowledged: int
    ack_delay_ms: int
    overtaken: bool
    def __init__(self, sequence: _Optional[int] = ..., origins: _Optional[_Iterable[_Union[Origin, _Mapping]]] = ..., buckets: _Optional[_Iterable[_Union[BucketDelta, _Mapping]]] = ..., ends_full_state: _Optional[bool] = ..., trace: _Optional[bytes] = ..., acknowledged: _Optional[int] = ..., ack_delay_ms: _Optional[int] = ..., overtaken: _Optional[bool] = ...) -> None: ...

class Origin(_message.Message):
    __slots__ = ("node", "incarnation")
    NODE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    node: str
    incarnation: int
    def __init__(self, node: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class BucketDelta(_message.Message):
    __slots__ = ("key", "base", "runs", "number", "refunds")
    KEY_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REFUNDS_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    base: Base
    runs: _containers.RepeatedCompositeFieldContainer[SlotRun]
    number: int
    refunds: _containers.RepeatedCompositeFieldContainer[SlotRun]
    def __init__(self, key: _Optional[bytes] = ..., base: _Optional[_Union[Base, _Mapping]] = ..., runs: _Optional[_Iterable[_Union[SlotRun, _Mapping]]] = ..., number: _Optional[int] = ..., refunds: _Optional[_Iterable[_Union[SlotRun, _Mapping]]] = ...) -> None: ...

class Base(_message.Message):
    __slots__ = ("boundary_us", "tokens", "remainder", "period_us")
    BOUNDARY_US_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REMAINDER_FIELD_NUMBER: _ClassVar[int]
    PERIOD_US_FIELD_NUMBER: _ClassVar[int]
    boundary_us: int
    tokens: int
    remainder: int
    period_us: int
    def __init__(self, boundary_us: _Optional[int] = ..., tokens: _Optional[int] = ..., remainder: _Optional[int] = ..., period_us: _Optional[int] = ...) -> None: ...

class SlotRun(_message.Message):
    __slots__ = ("origin", "exponent", "slots", "tokens")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    EXPONENT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    origin: int
    exponent: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, origin: _Optional[int] = ..., exponent: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("id", "sent_us", "demands")
    ID_FIELD_NUMBER: _ClassVar[int]
    SENT_US_FIELD_NUMBER: _ClassVar[int]
    DEMANDS_FIELD_NUMBER: _ClassVar[int]
    id: int
    sent_us: int
    demands: _containers.RepeatedCompositeFieldContainer[Demand]
    def __init__(self, id: _Optional[int] = ..., sent_us: _Optional[int] = ..., demands: _Optional[_Iterable[_Union[Demand, _Mapping]]] = ...) -> None: ...

class Demand(_message.Message):
    __slots__ = ("key", "wants", "members")
    KEY_FIELD_NUMBER: _ClassVar[int]
    WANTS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    wants: _containers.RepeatedScalarFieldContainer[int]
    members: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, key: _Optional[bytes] = ..., wants: _Optional[_Iterable[int]] = ..., members: _Optional[_Iterable[int]] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("id", "ping_sent_us", "received_us", "sent_us")
    ID_FIELD_NUMBER: _ClassVar[int]
    PING_SENT_US_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_US_FIELD_NUMBER: _ClassVar[int]
    SENT_US_FIELD_NUMBER: _ClassVar[int]
    id: int
    ping_sent_us: int
    received_us: int
    sent_us: int
    def __init__(self, id: _Optional[int] = ..., ping_sent_us: _Optional[int] = ..., received_us: _Optional[int] = ..., sent_us: _Optional[int] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason", "detail")
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    reason: str
    detail: str
    def __init__(self, reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class Payments(_message.Message):
    __slots__ = ("pays", "asks", "wishes", "tickets", "returns")
    PAYS_FIELD_NUMBER: _ClassVar[int]
    ASKS_FIELD_NUMBER: _ClassVar[int]
    WISHES_FIELD_NUMBER: _ClassVar[int]
    TICKETS_FIELD_NUMBER: _ClassVar[int]
    RETURNS_FIELD_NUMBER: _ClassVar[int]
    pays: _containers.RepeatedCompositeFieldContainer[Pay]
    asks: _containers.RepeatedCompositeFieldContainer[Ask]
    wishes: _containers.RepeatedCompositeFieldContainer[Wish]
    tickets: _containers.RepeatedCompositeFieldContainer[Ticket]
    returns: _containers.RepeatedCompositeFieldContainer[Return]
    def __init__(self, pays: _Optional[_Iterable[_Union[Pay, _Mapping]]] = ..., asks: _Optional[_Iterable[_Union[Ask, _Mapping]]] = ..., wishes: _Optional[_Iterable[_Union[Wish, _Mapping]]] = ..., tickets: _Optional[_Iterable[_Union[Ticket, _Mapping]]] = ..., returns: _Optional[_Iterable[_Union[Return, _Mapping]]] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("key", "amount", "level", "demand", "is_short")
    KEY_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    IS_SHORT_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    amount: int
    level: int
    demand: int
    is_short: bool
    def __init__(self, key: _Optional[bytes] = ..., amount: _Optional[int] = ..., level: _Optional[int] = ..., demand: _Optional[int] = ..., is_short: _Optional[bool] = ...) -> None: ...

class Pay(_message.Message):
    __slots__ = ("key", "amount", "left")
    KEY_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    amount: int
    left: int
    def __init__(self, key: _Optional[bytes] = ..., amount: _Optional[int] = ..., left: _Optional[int] = ...) -> None: ...

class Wish(_message.Message):
    __slots__ = ("number", "key", "tokens")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    number: int
    key: bytes
    tokens: int
    def __init__(self, number: _Optional[int] = ..., key: _Optional[bytes] = ..., tokens: _Optional[int] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("number", "tokens", "left")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    number: int
    tokens: int
    left: int
    def __init__(self, number: _Optional[int] = ..., tokens: _Optional[int] = ..., left: _Optional[int] = ...) -> None: ...

class Return(_message.Message):
    __slots__ = ("number", "amount")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    number: int
    amount: int
    def __init__(self, number: _Optional[int] = ..., amount: _Optional[int] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("reaches", "rules", "full", "joined", "sync_request", "missed_since_us")
    REACHES_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    SYNC_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MISSED_SINCE_US_FIELD_NUMBER: _ClassVar[int]
    reaches: _containers.RepeatedScalarFieldContainer[str]
    rules: int
    full: bool
    joined: bool
    sync_request: SyncRequest
    missed_since_us: int
    def __init__(self, reaches: _Optional[_Iterable[str]] = ..., rules: _Optional[int] = ..., full: _Optional[bool] = ..., joined: _Optional[bool] = ..., sync_request: _Optional[_Union[SyncRequest, str]] = ..., missed_since_us: _Optional[int] = ...) -> None: ...

class Digest(_message.Message):
    __slots__ = ("at_us", "segments", "sums")
    AT_US_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    at_us: int
    segments: _containers.RepeatedScalarFieldContainer[int]
    sums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, at_us: _Optional[int] = ..., segments: _Optional[_Iterable[int]] = ..., sums: _Optional[_Iterable[int]] = ...) -> None: ...

class Summary(_message.Message):
    __slots__ = ("at_us", "range", "keys", "states")
    AT_US_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    at_us: int
    range: int
    keys: _containers.RepeatedScalarFieldContainer[int]
    states: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, at_us: _Optional[int] = ..., range: _Optional[int] = ..., keys: _Optional[_Iterable[int]] = ..., states: _Optional[_Iterable[int]] = ...) -> None: ...

class Pull(_message.Message):
    __slots__ = ("at_us", "range", "keys")
    AT_US_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    at_us: int
    range: int
    keys: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, at_us: _Optional[int] = ..., range: _Optional[int] = ..., keys: _Optional[_Iterable[int]] = ...) -> None: ...
