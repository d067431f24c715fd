"""grpc.reflection: lists services and the format of their messages, so that tools such as grpcurl need no .proto files
(grpc/doc/server-reflection.md).

It describes only the services it is given and their messages, all of which are public. The generation v1 is v1alpha
under another name.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from typing import Final

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorProto
from grpc_reflection.v1alpha.reflection_pb2 import (
    DESCRIPTOR,
    ErrorResponse,
    ExtensionNumberResponse,
    FileDescriptorResponse,
    ListServiceResponse,
    ServerReflectionRequest,
    ServerReflectionResponse,
    ServiceResponse,
)

from ratelimit_sidecar.server.rpc import Code, Handlers, Metadata, StreamingMethod, read_small

PACKAGES: Final = ("grpc.reflection.v1", "grpc.reflection.v1alpha")

_SERVICE: Final = "ServerReflection"


class ReflectionService:
    """One method, `ServerReflectionInfo`: a stream of questions, each with its answer.

    Args:
        services: full names; their generated modules must be imported.
    """

    def __init__(self, services: Iterable[str]) -> None:
        pool = descriptor_pool.Default()
        found = {name: pool.FindServiceByName(name).file for name in services}
        files = [_read(file) for file in _with_dependencies(found.values())]
        files += [_reflection_itself(package) for package in PACKAGES]
        self._services = sorted((*found, *(f"{package}.{_SERVICE}" for package in PACKAGES)))
        self._files = {file.name: file.SerializeToString() for file in files}
        self._imports = {file.name: tuple(file.dependency) for file in files}
        self._file_of_symbol = {symbol: file.name for file in files for symbol in _symbols(file)}
        self._file_of_extension = {
            (extendee, number): file.name for file in files for extendee, number in _extensions(file)
        }

    def handlers(self) -> Handlers:
        """For a front end."""
        return {f"/{package}.{_SERVICE}/ServerReflectionInfo": StreamingMethod(self.info) for package in PACKAGES}

    async def info(self, requests: AsyncIterator[bytes], _metadata: Metadata) -> AsyncGenerator[bytes, None]:
        """Answer each serialized ServerReflectionRequest with a serialized ServerReflectionResponse.

        Raises:
            RpcError: INVALID_ARGUMENT for something else than a request.
        """
        sent: set[str] = set()
        async for raw in requests:
            # Nothing of it is kept while the next one is awaited.
            yield self._answered(raw, sent)

    def _answered(self, raw: bytes, sent: set[str]) -> bytes:
        request = read_small(ServerReflectionRequest.FromString, raw, "ServerReflectionRequest")
        answer = self._answer(request, sent)
        answer.valid_host = request.host
        answer.original_request.CopyFrom(request)
        serialized: bytes = answer.SerializeToString()
        return serialized

    def _answer(self, request: ServerReflectionRequest, sent: set[str]) -> ServerReflectionResponse:
        match request.WhichOneof("message_request"):
            case "list_services":
                services = [ServiceResponse(name=name) for name in self._services]
                return ServerReflectionResponse(list_services_response=ListServiceResponse(service=services))
            case "file_by_filename":
                return self._file(request.file_by_filename, sent)
            case "file_containing_symbol":
                return self._file(self._file_of_symbol.get(request.file_containing_symbol), sent)
            case "file_containing_extension":
                asked = request.file_containing_extension
                return self._file(self._file_of_extension.get((asked.containing_type, asked.extension_number)), sent)
            case "all_extension_numbers_of_type":
                return self._extension_numbers(request.all_extension_numbers_of_type)
            case _:
                return _error(Code.INVALID_ARGUMENT, "the request asks nothing that is known here")

    def _file(self, name: str | None, sent: set[str]) -> ServerReflectionResponse:
        """The file, and those of its imports that were not sent in this call yet."""
        if name is None or name not in self._files:
            return _error(Code.NOT_FOUND, "not found")
        found = [name]
        sent.add(name)
        for file in found:
            new = [imported for imported in self._imports[file] if imported not in sent]
            found += new
            sent.update(new)
        files = [self._files[file] for file in found]
        return ServerReflectionResponse(file_descriptor_response=FileDescriptorResponse(file_descriptor_proto=files))

    def _extension_numbers(self, type_name: str) -> ServerReflectionResponse:
        if type_name not in self._file_of_symbol:
            return _error(Code.NOT_FOUND, "not found")
        numbers = sorted(number for extendee, number in self._file_of_extension if extendee == type_name)
        return ServerReflectionResponse(
            all_extension_numbers_response=ExtensionNumberResponse(base_type_name=type_name, extension_number=numbers)
        )


def _error(code: Code, message: str) -> ServerReflectionResponse:
    return ServerReflectionResponse(error_response=ErrorResponse(error_code=code, error_message=message))


def _with_dependencies(files: Iterable[FileDescriptor]) -> Iterable[FileDescriptor]:
    found: dict[str, FileDescriptor] = {}
    left = list(files)
    while left:
        file = left.pop()
        if file.name not in found:
            found[file.name] = file
            left += file.dependencies
    return found.values()


def _read(file: FileDescriptor) -> FileDescriptorProto:
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    return proto


def _reflection_itself(package: str) -> FileDescriptorProto:
    proto = _read(DESCRIPTOR)
    original = proto.package
    proto.package = package
    proto.name = f"{package.replace('.', '/')}/reflection.proto"
    for message in proto.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(f".{original}.", f".{package}.")
    for method in proto.service[0].method:
        method.input_type = method.input_type.replace(f".{original}.", f".{package}.")
        method.output_type = method.output_type.replace(f".{original}.", f".{package}.")
    return proto


def _symbols(file: FileDescriptorProto) -> Iterator[str]:
    """Full names of all that a file declares."""
    scope = f"{file.package}." if file.package else ""
    for message in file.message_type:
        yield from _symbols_of_message(scope, message)
    for enum in file.enum_type:
        yield from _symbols_of_enum(scope, enum)
    for extension in file.extension:
        yield scope + extension.name
    for service in file.service:
        yield scope + service.name
        for method in service.method:
            yield f"{scope}{service.name}.{method.name}"


def _symbols_of_message(scope: str, message: DescriptorProto) -> Iterator[str]:
    yield scope + message.name
    scope += f"{message.name}."
    for nested in message.nested_type:
        yield from _symbols_of_message(scope, nested)
    for enum in message.enum_type:
        yield from _symbols_of_enum(scope, enum)
    for field in (*message.field, *message.extension):
        yield scope + field.name
    for oneof in message.oneof_decl:
        yield scope + oneof.name


def _symbols_of_enum(scope: str, enum: EnumDescriptorProto) -> Iterator[str]:
    """The names of its values stand beside its own."""
    yield scope + enum.name
    for value in enum.value:
        yield scope + value.name


def _extensions(file: FileDescriptorProto) -> Iterator[tuple[str, int]]:
    """The extensions of a file: the type that each extends, and its number there."""
    scopes: list[FileDescriptorProto | DescriptorProto] = [file]
    while scopes:
        scope = scopes.pop()
        for extension in scope.extension:
            yield extension.extendee.removeprefix("."), extension.number
        scopes += scope.message_type if isinstance(scope, FileDescriptorProto) else scope.nested_type
