# Three regions of AWS: a VPC and a cluster each, peered two by two, with one private DNS zone and one mesh of sidecars.

terraform {
  required_version = ">= 1.7"
  required_providers {
    aws        = { source = "hashicorp/aws", version = "~> 6.0" }
    helm       = { source = "hashicorp/helm", version = "~> 3.0" }
    kubernetes = { source = "hashicorp/kubernetes", version = "~> 3.0" }
    tls        = { source = "hashicorp/tls", version = "~> 4.0" }
  }
}

variable "image" {
  description = "Where the clusters pull it from."
  type        = object({ repository = string, tag = optional(string), digest = optional(string) })
}

variable "administrators" {
  description = "Address ranges from which you reach the clusters."
  type        = list(string)
}

variable "rules" {
  description = "A folder; that of the demo when null."
  type        = string
  default     = null
}

variable "domain" {
  type    = string
  default = "mesh.example.internal"
}

variable "edge_token" {
  type      = string
  sensitive = true
}

variable "edge_certificates" {
  description = "ARNs of ACM's certificates, by region, for the edge's load balancers."
  type        = map(string)
}

locals {
  cidrs = {
    us-east-1      = "10.1.0.0/16"
    eu-west-2      = "10.2.0.0/16"
    ap-southeast-1 = "10.3.0.0/16"
  }
  names  = { for region in keys(local.cidrs) : region => "${region}.${var.domain}" }
  peers  = { for region in keys(local.cidrs) : region => [for other, cidr in local.cidrs : cidr if other != region] }
  folder = coalesce(var.rules, "${path.module}/../../../../examples/openclaw/rules")
  rules  = { for file in fileset(local.folder, "*.yaml") : file => file("${local.folder}/${file}") }
  edges = {
    for region, certificate in var.edge_certificates : region => {
      "service.beta.kubernetes.io/aws-load-balancer-type"             = "nlb"
      "service.beta.kubernetes.io/aws-load-balancer-ssl-cert"         = certificate
      "service.beta.kubernetes.io/aws-load-balancer-ssl-ports"        = "443"
      "service.beta.kubernetes.io/aws-load-balancer-backend-protocol" = "tcp"
    }
  }
  clusters = { for region, found in module.cloud : region => found.cluster }
}

# Every resource names its region itself.
provider "aws" {
  region = "us-east-1"
}

module "cloud" {
  source         = "../../modules/region-aws"
  for_each       = local.cidrs
  name           = "ratelimit-${each.key}"
  region         = each.key
  cidr           = each.value
  peer_cidrs     = local.peers[each.key]
  administrators = var.administrators
}

module "network" {
  source = "../../modules/mesh-aws"
  domain = var.domain
  vpcs   = { for region, found in module.cloud : region => found.vpc }
}

module "mesh" {
  source  = "../../modules/mesh"
  domain  = var.domain
  regions = { for region, name in local.names : region => "${name}:50051" }
}
