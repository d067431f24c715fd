"""What tools learn of this server's services, by gRPC's own client of reflection."""

import asyncio

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_reflection.v1alpha.reflection_pb2 import (
    ExtensionRequest,
    ServerReflectionRequest,
    ServerReflectionResponse,
)
from server.front_ends import EACH_KIND, channel_to, running

from ratelimit_sidecar.server.rpc import MAX_SMALL_BYTES
from ratelimit_sidecar.services import health
from ratelimit_sidecar.services.ratelimit import SERVICE_NAME
from ratelimit_sidecar.services.reflection import PACKAGES, ReflectionService

SERVICES = [SERVICE_NAME, health.SERVICE_NAME]


@pytest.fixture(params=EACH_KIND)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


async def ask(address: str, *requests: ServerReflectionRequest, package: str = PACKAGES[0]):
    async with channel_to(address) as channel:
        method = channel.stream_stream(
            f"/{package}.ServerReflection/ServerReflectionInfo",
            request_serializer=ServerReflectionRequest.SerializeToString,
            response_deserializer=ServerReflectionResponse.FromString,
        )
        return [answer async for answer in method(iter(requests), timeout=10)]


def read_all(address: str) -> tuple[list[str], list[str]]:
    """What gRPC's blocking client finds: services, and the fields of a request."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        method = pool.FindServiceByName(SERVICE_NAME).FindMethodByName("ShouldRateLimit")
        return list(database.get_services()), [field.name for field in method.input_type.fields]


@pytest.mark.parametrize("transport", ["tcp", "unix"])
async def test_grpcs_own_client_finds_services_and_messages(kind: str, transport: str, tmp_path) -> None:
    address = f"unix:{tmp_path}/s.sock" if transport == "unix" else "127.0.0.1:0"
    async with running(kind, ReflectionService(SERVICES).handlers(), [address]) as front_end:
        services, fields = await asyncio.to_thread(read_all, front_end.addresses[0])
    assert services == [*SERVICES, *(f"{package}.ServerReflection" for package in PACKAGES)]
    assert fields == ["domain", "descriptors", "hits_addend"]


@pytest.mark.parametrize("package", PACKAGES)
async def test_both_generations_describe_all_that_they_list(kind: str, package: str) -> None:
    """As files from which a descriptor pool can be built without asking for more."""
    async with running(kind, ReflectionService(SERVICES).handlers()) as front_end:
        address = front_end.addresses[0]
        [listed] = await ask(address, ServerReflectionRequest(list_services=""), package=package)
        names = [service.name for service in listed.list_services_response.service]
        answers = await ask(
            address, *(ServerReflectionRequest(file_containing_symbol=name) for name in names), package=package
        )
    pool = DescriptorPool()
    files: dict[str, descriptor_pb2.FileDescriptorProto] = {}
    for answer in answers:
        for raw in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(raw)
            # Each is sent once, so that large ones do not come with every answer.
            assert file.name not in files
            files[file.name] = file

    def add(name: str) -> None:
        file = files.pop(name, None)
        if file is not None:
            for imported in file.dependency:
                add(imported)
            pool.Add(file)

    for name in list(files):
        add(name)
    assert [pool.FindServiceByName(name).full_name for name in names] == names


@pytest.mark.parametrize(
    ("symbol", "file"),
    [
        (SERVICE_NAME, "envoy/service/ratelimit/v3/rls.proto"),
        (f"{SERVICE_NAME}.ShouldRateLimit", "envoy/service/ratelimit/v3/rls.proto"),
        ("envoy.service.ratelimit.v3.RateLimitResponse", "envoy/service/ratelimit/v3/rls.proto"),
        ("envoy.service.ratelimit.v3.RateLimitResponse.RateLimit.Unit", "envoy/service/ratelimit/v3/rls.proto"),
        ("envoy.service.ratelimit.v3.RateLimitResponse.RateLimit.MINUTE", "envoy/service/ratelimit/v3/rls.proto"),
        ("envoy.service.ratelimit.v3.RateLimitRequest.domain", "envoy/service/ratelimit/v3/rls.proto"),
        ("google.protobuf.Duration", "google/protobuf/duration.proto"),
        ("udpa.annotations.versioning", "udpa/annotations/versioning.proto"),
        ("grpc.reflection.v1.ServerReflectionRequest", "grpc/reflection/v1/reflection.proto"),
        ("grpc.reflection.v1alpha.ServerReflectionRequest", "grpc/reflection/v1alpha/reflection.proto"),
    ],
)
async def test_everything_declared_is_found(symbol: str, file: str) -> None:
    async with running("h2", ReflectionService(SERVICES).handlers()) as front_end:
        [answer] = await ask(front_end.addresses[0], ServerReflectionRequest(file_containing_symbol=symbol))
    first = answer.file_descriptor_response.file_descriptor_proto[0]
    assert descriptor_pb2.FileDescriptorProto.FromString(first).name == file


async def test_extensions_are_found_by_the_type_that_they_extend() -> None:
    async with running("h2", ReflectionService(SERVICES).handlers()) as front_end:
        address = front_end.addresses[0]
        [numbers] = await ask(
            address, ServerReflectionRequest(all_extension_numbers_of_type="google.protobuf.MessageOptions")
        )
        found = numbers.all_extension_numbers_response.extension_number
        assert found
        answers = await ask(
            address,
            *(
                ServerReflectionRequest(
                    file_containing_extension=ExtensionRequest(
                        containing_type="google.protobuf.MessageOptions", extension_number=number
                    )
                )
                for number in found
            ),
        )
    assert all(answer.file_descriptor_response.file_descriptor_proto for answer in answers)


@pytest.mark.parametrize(
    "request_",
    [
        ServerReflectionRequest(file_by_filename="nothing.proto"),
        ServerReflectionRequest(file_containing_symbol="nothing.Nothing"),
        ServerReflectionRequest(
            file_containing_extension=ExtensionRequest(
                containing_type="google.protobuf.MessageOptions", extension_number=1
            )
        ),
        ServerReflectionRequest(all_extension_numbers_of_type="nothing.Nothing"),
    ],
)
async def test_what_is_not_there_is_not_found_and_the_call_goes_on(request_: ServerReflectionRequest) -> None:
    async with running("h2", ReflectionService(SERVICES).handlers()) as front_end:
        answer, again = await ask(front_end.addresses[0], request_, request_)
    assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    assert answer.original_request == request_
    assert again == answer


async def test_a_question_that_is_none_is_an_invalid_argument() -> None:
    async with running("h2", ReflectionService(SERVICES).handlers()) as front_end:
        [answer] = await ask(front_end.addresses[0], ServerReflectionRequest(host="here"))
    assert answer.error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert answer.valid_host == "here"


@pytest.mark.parametrize("sent", [b"\xff", ServerReflectionRequest(host="h" * MAX_SMALL_BYTES).SerializeToString()])
async def test_something_else_than_a_question_ends_the_call(kind: str, sent: bytes) -> None:
    async with (
        running(kind, ReflectionService(SERVICES).handlers()) as front_end,
        channel_to(front_end.addresses[0]) as channel,
    ):
        path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        call = channel.stream_stream(path)(iter([sent]), timeout=10)
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_what_no_service_is_made_of_is_not_told() -> None:
    from ratelimit_sidecar.replication.v1 import replication_pb2

    question = ServerReflectionRequest(file_by_filename=replication_pb2.DESCRIPTOR.name)
    async with running("h2", ReflectionService(SERVICES).handlers()) as front_end:
        [answer] = await ask(front_end.addresses[0], question)
    assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
