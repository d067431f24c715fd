from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Header(_message.Message):
    __slots__ = ("node", "incarnation", "begun_at_us")
    NODE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BEGUN_AT_US_FIELD_NUMBER: _ClassVar[int]
    node: str
    incarnation: int
    begun_at_us: int
    def __init__(self, node: _Optional[str] = ..., incarnation: _Optional[int] = ..., begun_at_us: _Optional[int] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("buckets",)
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    buckets: int
    def __init__(self, buckets: _Optional[int] = ...) -> None: ...
