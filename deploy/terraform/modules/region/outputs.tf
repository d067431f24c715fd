output "namespace" {
  value = kubernetes_namespace_v1.this.metadata[0].name
}

output "address" {
  description = "Where Envoys of the cluster ask."
  value       = "${local.fullname}.${var.namespace}.svc.cluster.local:8081"
}

