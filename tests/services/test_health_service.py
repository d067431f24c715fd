import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from ratelimit_sidecar.server.rpc import Code, RpcError
from ratelimit_sidecar.services.health import HealthService
from ratelimit_sidecar.services.ratelimit import SERVICE_NAME


def check(health: HealthService, service: str) -> HealthCheckResponse:
    return HealthCheckResponse.FromString(health.check(HealthCheckRequest(service=service).SerializeToString(), ()))


@pytest.mark.parametrize("service", ["", SERVICE_NAME])
def test_a_known_service_is_serving_while_the_sidecar_is(service: str) -> None:
    serving = False
    health = HealthService(lambda: serving, [SERVICE_NAME])
    assert check(health, service).status == HealthCheckResponse.NOT_SERVING
    serving = True
    assert check(health, service).status == HealthCheckResponse.SERVING
    serving = False
    assert check(health, service).status == HealthCheckResponse.NOT_SERVING


def test_an_unknown_service_is_not_found() -> None:
    with pytest.raises(RpcError, match=r"unknown service envoy\.Nothing") as caught:
        check(HealthService(lambda: True, [SERVICE_NAME]), "envoy.Nothing")
    assert caught.value.code == Code.NOT_FOUND


def test_something_else_than_a_request_is_an_invalid_argument() -> None:
    with pytest.raises(RpcError, match=r"not a grpc\.health\.v1\.HealthCheckRequest") as caught:
        HealthService(lambda: True, []).check(b"\xff", ())
    assert caught.value.code == Code.INVALID_ARGUMENT
