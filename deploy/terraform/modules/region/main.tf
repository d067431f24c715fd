# The sidecars of one region, in a cluster that the given providers reach.

terraform {
  required_version = ">= 1.7"
  required_providers {
    helm       = { source = "hashicorp/helm", version = "~> 3.0" }
    kubernetes = { source = "hashicorp/kubernetes", version = "~> 3.0" }
  }
}

locals {
  chart    = coalesce(var.chart, "${path.module}/../../../helm/ratelimit-sidecar")
  fullname = "${var.release}-ratelimit-sidecar"
  tls_name = "${var.release}-mesh-tls"
}

resource "kubernetes_namespace_v1" "this" {
  metadata {
    name = var.namespace
  }
}

# Sidecars read a new one by themselves.
resource "kubernetes_secret_v1" "mesh" {
  type = "kubernetes.io/tls"
  metadata {
    name      = local.tls_name
    namespace = kubernetes_namespace_v1.this.metadata[0].name
  }
  data = {
    "tls.crt" = var.certificate.certificate
    "tls.key" = var.certificate.key
    "ca.crt"  = var.certificate.ca
  }
}

resource "helm_release" "this" {
  name      = var.release
  namespace = kubernetes_namespace_v1.this.metadata[0].name
  chart     = local.chart
  # A release that does not become ready is taken back.
  atomic  = true
  wait    = true
  timeout = 300

  values = concat(
    [
      yamlencode({
        region = var.name
        image  = { for key, value in var.image : key => value if value != null }
        rules  = var.rules
        mesh = {
          peers              = var.mesh.peers
          serviceAnnotations = var.dns_name == null ? {} : { "external-dns.alpha.kubernetes.io/hostname" = var.dns_name }
          tls = {
            from       = "secret"
            secretName = kubernetes_secret_v1.mesh.metadata[0].name
            peerNames  = var.mesh.peer_names
          }
        }
        networkPolicy = { peerCidrs = var.peer_cidrs }
      }),
    ],
    var.values,
  )
}
