mock_provider "helm" {}
mock_provider "kubernetes" {}

variables {
  name        = "us-east-1"
  image       = { repository = "registry.example.com/ratelimit-sidecar", tag = "1.0.0" }
  rules       = { "shop.yaml" = "domain: shop\n" }
  mesh        = { peers = ["eu:50051"], peer_names = "ratelimit.{region}.mesh.internal" }
  certificate = { certificate = "certificate", key = "key", ca = "authority" }
  dns_name    = "us-east-1.mesh.internal"
  peer_cidrs  = ["10.2.0.0/16"]
  values      = ["kind: StatefulSet"]
}

run "the_release_has_what_the_mesh_says" {
  assert {
    condition = yamldecode(helm_release.this.values[0]) == {
      region = "us-east-1"
      image  = { repository = "registry.example.com/ratelimit-sidecar", tag = "1.0.0" }
      rules  = { "shop.yaml" = "domain: shop\n" }
      mesh = {
        peers              = ["eu:50051"]
        serviceAnnotations = { "external-dns.alpha.kubernetes.io/hostname" = "us-east-1.mesh.internal" }
        tls                = { from = "secret", secretName = "rl-mesh-tls", peerNames = "ratelimit.{region}.mesh.internal" }
      }
      networkPolicy = { peerCidrs = ["10.2.0.0/16"] }
    }
    error_message = "These are the chart's values."
  }
  assert {
    condition     = helm_release.this.values[1] == "kind: StatefulSet"
    error_message = "Own values come last."
  }
  assert {
    condition     = kubernetes_secret_v1.mesh.type == "kubernetes.io/tls" && nonsensitive(kubernetes_secret_v1.mesh.data["ca.crt"]) == "authority"
    error_message = "The certificate is in a Secret."
  }
  assert {
    condition     = output.address == "rl-ratelimit-sidecar.ratelimit.svc.cluster.local:8081"
    error_message = "There Envoys ask."
  }
}
