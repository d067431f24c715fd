mock_provider "kubernetes" {}

variables {
  namespace = "ratelimit"
  address   = "rl-ratelimit-sidecar.ratelimit.svc.cluster.local:8081"
  token     = "0123456789abcdef0123456789abcdef"
}

run "it_asks_the_sidecars_and_knows_the_token" {
  assert {
    condition     = strcontains(nonsensitive(kubernetes_secret_v1.this.data["envoy.yaml"]), "\"exact\":\"Bearer ${var.token}\"")
    error_message = "Only who has the token gets in."
  }
  assert {
    condition = strcontains(
      nonsensitive(kubernetes_secret_v1.this.data["envoy.yaml"]), "rl-ratelimit-sidecar.ratelimit.svc.cluster.local\",\"port_value\":8081"
    )
    error_message = "It asks the sidecars of its region."
  }
  assert {
    condition     = !strcontains(nonsensitive(kubernetes_secret_v1.this.data["envoy.yaml"]), "9901")
    error_message = "Envoy's own admin port stays shut."
  }
}

run "a_token_that_can_be_guessed_is_refused" {
  command = plan
  variables {
    token = "change-me"
  }
  expect_failures = [var.token]
}
