# Three regions in one cluster, a namespace each, and an edge before the first: no cloud, only a kubeconfig.

terraform {
  required_version = ">= 1.7"
  required_providers {
    helm       = { source = "hashicorp/helm", version = "~> 3.0" }
    kubernetes = { source = "hashicorp/kubernetes", version = "~> 3.0" }
    tls        = { source = "hashicorp/tls", version = "~> 4.0" }
  }
}

variable "kubeconfig" {
  type    = string
  default = "~/.kube/config"
}

variable "context" {
  description = "Of the kubeconfig; its current one when null."
  type        = string
  default     = null
}

variable "regions" {
  type    = set(string)
  default = ["us-east-1", "eu-west-2", "ap-southeast-1"]
}

variable "image" {
  type    = object({ repository = string, tag = optional(string) })
  default = { repository = "ratelimit-sidecar", tag = "local" }
}

variable "rules" {
  description = "A folder; that of the demo when null."
  type        = string
  default     = null
}

variable "pod_cidr" {
  description = "Of the cluster's pods, which reach each other over namespaces."
  type        = string
  default     = "10.0.0.0/8"
}

variable "edge_token" {
  description = "No edge when null."
  type        = string
  default     = null
  sensitive   = true
}

locals {
  folder = coalesce(var.rules, "${path.module}/../../../../examples/openclaw/rules")
  rules  = { for file in fileset(local.folder, "*.yaml") : file => file("${local.folder}/${file}") }
}

provider "kubernetes" {
  config_path    = var.kubeconfig
  config_context = var.context
}

provider "helm" {
  kubernetes = {
    config_path    = var.kubeconfig
    config_context = var.context
  }
}

module "mesh" {
  source  = "../../modules/mesh"
  domain  = "mesh.internal"
  regions = { for region in var.regions : region => "rl-ratelimit-sidecar-mesh.ratelimit-${region}.svc:50051" }
}

module "region" {
  source      = "../../modules/region"
  for_each    = var.regions
  name        = each.key
  namespace   = "ratelimit-${each.key}"
  image       = var.image
  rules       = local.rules
  mesh        = module.mesh.regions[each.key]
  certificate = module.mesh.certificates[each.key]
  peer_cidrs  = [var.pod_cidr]
}

module "edge" {
  source       = "../../modules/edge"
  count        = nonsensitive(var.edge_token == null) ? 0 : 1
  namespace    = module.region[sort(var.regions)[0]].namespace
  address      = module.region[sort(var.regions)[0]].address
  token        = var.edge_token
  service_type = "ClusterIP"
}

output "addresses" {
  description = "Where Envoys of each region ask."
  value       = { for name, region in module.region : name => region.address }
}
