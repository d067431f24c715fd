# Envoys that let edge functions ask the sidecars: POST /ask with the token, and nothing else (docs/edge.md).

terraform {
  required_version = ">= 1.7"
  required_providers {
    kubernetes = { source = "hashicorp/kubernetes", version = "~> 3.0" }
  }
}

variable "namespace" {
  description = "That of the region's sidecars."
  type        = string
}

variable "address" {
  description = "The region module's output of that name: where its sidecars are asked."
  type        = string
}

variable "token" {
  description = "What edge functions send as Authorization: Bearer TOKEN."
  type        = string
  sensitive   = true
  validation {
    condition     = can(regex("^[A-Za-z0-9_.~-]{32,}$", var.token))
    error_message = "At least 32 letters, digits, or _.~-"
  }
}

variable "image" {
  type    = string
  default = "envoyproxy/envoy:v1.40.0"
}

variable "replicas" {
  description = "Envoys."
  type        = number
  default     = 2
}

variable "service_type" {
  description = "LoadBalancer where the cluster has one. It has to end TLS, or stand behind what does."
  type        = string
  default     = "LoadBalancer"
}

variable "service_port" {
  type    = number
  default = 80
}

variable "service_annotations" {
  description = "For the load balancer, its certificate and its name: external-dns and the cloud's controller read them."
  type        = map(string)
  default     = {}
}

locals {
  name   = "ratelimit-edge"
  labels = { "app.kubernetes.io/name" = local.name }
  port   = 10000
  # The configuration that tests run, with addresses of a cluster.
  example = yamldecode(file("${path.module}/../../../../examples/edge/envoy.yaml"))
  listen  = { socket_address = { address = "0.0.0.0", port_value = local.port } }
  sidecar = { socket_address = { address = split(":", var.address)[0], port_value = tonumber(split(":", var.address)[1]) } }
  envoy = {
    static_resources = {
      listeners = [merge(local.example.static_resources.listeners[0], { address = local.listen })]
      clusters = [merge(local.example.static_resources.clusters[0], {
        type = "STRICT_DNS"
        load_assignment = {
          cluster_name = "sidecar"
          endpoints    = [{ lb_endpoints = [{ endpoint = { address = local.sidecar } }] }]
        }
      })]
    }
  }
  # JSON is YAML, and the token has no character that JSON would write otherwise.
  configuration = replace(jsonencode(local.envoy), "change-me", var.token)
}

resource "kubernetes_secret_v1" "this" {
  metadata {
    name      = local.name
    namespace = var.namespace
    labels    = local.labels
  }
  data = { "envoy.yaml" = local.configuration }
}

resource "kubernetes_deployment_v1" "this" {
  metadata {
    name      = local.name
    namespace = var.namespace
    labels    = local.labels
  }
  spec {
    replicas = var.replicas
    selector {
      match_labels = local.labels
    }
    template {
      metadata {
        labels = local.labels
        # Envoy reads its file once.
        annotations = { "checksum/envoy" = sha256(local.configuration) }
      }
      spec {
        automount_service_account_token = false
        security_context {
          run_as_non_root = true
          run_as_user     = 101
          seccomp_profile {
            type = "RuntimeDefault"
          }
        }
        container {
          name  = "envoy"
          image = var.image
          args  = ["--config-path", "/etc/envoy/envoy.yaml"]
          port {
            name           = "http"
            container_port = local.port
          }
          readiness_probe {
            tcp_socket {
              port = local.port
            }
          }
          resources {
            requests = { cpu = "100m", memory = "128Mi" }
            limits   = { memory = "512Mi" }
          }
          security_context {
            allow_privilege_escalation = false
            read_only_root_filesystem  = true
            capabilities {
              drop = ["ALL"]
            }
          }
          volume_mount {
            name       = "envoy"
            mount_path = "/etc/envoy"
            read_only  = true
          }
        }
        volume {
          name = "envoy"
          secret {
            secret_name = kubernetes_secret_v1.this.metadata[0].name
          }
        }
      }
    }
  }
}

resource "kubernetes_service_v1" "this" {
  wait_for_load_balancer = false
  metadata {
    name        = local.name
    namespace   = var.namespace
    labels      = local.labels
    annotations = var.service_annotations
  }
  spec {
    type     = var.service_type
    selector = local.labels
    port {
      name        = "http"
      port        = var.service_port
      target_port = "http"
    }
  }
}

output "service" {
  description = "NAMESPACE/NAME of the service, whose load balancer edge functions are to reach."
  value       = "${var.namespace}/${kubernetes_service_v1.this.metadata[0].name}"
}
