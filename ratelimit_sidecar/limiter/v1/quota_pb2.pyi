import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import wrappers_pb2 as _wrappers_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BlanketRule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ALLOW_ALL: _ClassVar[BlanketRule]
    DENY_ALL: _ClassVar[BlanketRule]
ALLOW_ALL: BlanketRule
DENY_ALL: BlanketRule

class UsageReports(_message.Message):
    __slots__ = ("domain", "bucket_quota_usages")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    BUCKET_QUOTA_USAGES_FIELD_NUMBER: _ClassVar[int]
    domain: bytes
    bucket_quota_usages: _containers.RepeatedCompositeFieldContainer[BucketUsage]
    def __init__(self, domain: _Optional[bytes] = ..., bucket_quota_usages: _Optional[_Iterable[_Union[BucketUsage, _Mapping]]] = ...) -> None: ...

class BucketUsage(_message.Message):
    __slots__ = ("bucket_id", "time_elapsed", "num_requests_allowed", "num_requests_denied")
    BUCKET_ID_FIELD_NUMBER: _ClassVar[int]
    TIME_ELAPSED_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_ALLOWED_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_DENIED_FIELD_NUMBER: _ClassVar[int]
    bucket_id: bytes
    time_elapsed: _duration_pb2.Duration
    num_requests_allowed: int
    num_requests_denied: int
    def __init__(self, bucket_id: _Optional[bytes] = ..., time_elapsed: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., num_requests_allowed: _Optional[int] = ..., num_requests_denied: _Optional[int] = ...) -> None: ...

class BucketId(_message.Message):
    __slots__ = ("bucket",)
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    bucket: _containers.RepeatedCompositeFieldContainer[BucketEntry]
    def __init__(self, bucket: _Optional[_Iterable[_Union[BucketEntry, _Mapping]]] = ...) -> None: ...

class BucketEntry(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    value: bytes
    def __init__(self, key: _Optional[bytes] = ..., value: _Optional[bytes] = ...) -> None: ...

class QuotaResponse(_message.Message):
    __slots__ = ("bucket_action",)
    BUCKET_ACTION_FIELD_NUMBER: _ClassVar[int]
    bucket_action: _containers.RepeatedCompositeFieldContainer[BucketAction]
    def __init__(self, bucket_action: _Optional[_Iterable[_Union[BucketAction, _Mapping]]] = ...) -> None: ...

class BucketAction(_message.Message):
    __slots__ = ("bucket_id", "quota_assignment_action", "abandon_action")
    BUCKET_ID_FIELD_NUMBER: _ClassVar[int]
    QUOTA_ASSIGNMENT_ACTION_FIELD_NUMBER: _ClassVar[int]
    ABANDON_ACTION_FIELD_NUMBER: _ClassVar[int]
    bucket_id: bytes
    quota_assignment_action: QuotaAssignment
    abandon_action: Abandon
    def __init__(self, bucket_id: _Optional[bytes] = ..., quota_assignment_action: _Optional[_Union[QuotaAssignment, _Mapping]] = ..., abandon_action: _Optional[_Union[Abandon, _Mapping]] = ...) -> None: ...

class QuotaAssignment(_message.Message):
    __slots__ = ("assignment_time_to_live", "rate_limit_strategy")
    ASSIGNMENT_TIME_TO_LIVE_FIELD_NUMBER: _ClassVar[int]
    RATE_LIMIT_STRATEGY_FIELD_NUMBER: _ClassVar[int]
    assignment_time_to_live: _duration_pb2.Duration
    rate_limit_strategy: RateLimitStrategy
    def __init__(self, assignment_time_to_live: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., rate_limit_strategy: _Optional[_Union[RateLimitStrategy, _Mapping]] = ...) -> None: ...

class Abandon(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RateLimitStrategy(_message.Message):
    __slots__ = ("blanket_rule", "token_bucket")
    BLANKET_RULE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_BUCKET_FIELD_NUMBER: _ClassVar[int]
    blanket_rule: BlanketRule
    token_bucket: TokenBucket
    def __init__(self, blanket_rule: _Optional[_Union[BlanketRule, str]] = ..., token_bucket: _Optional[_Union[TokenBucket, _Mapping]] = ...) -> None: ...

class TokenBucket(_message.Message):
    __slots__ = ("max_tokens", "tokens_per_fill", "fill_interval")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_FILL_FIELD_NUMBER: _ClassVar[int]
    FILL_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    tokens_per_fill: _wrappers_pb2.UInt32Value
    fill_interval: _duration_pb2.Duration
    def __init__(self, max_tokens: _Optional[int] = ..., tokens_per_fill: _Optional[_Union[_wrappers_pb2.UInt32Value, _Mapping]] = ..., fill_interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
