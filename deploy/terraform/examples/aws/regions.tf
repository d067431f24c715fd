# What has to be said once a region: providers are found by name alone.

provider "kubernetes" {
  alias                  = "us"
  host                   = local.clusters["us-east-1"].endpoint
  cluster_ca_certificate = local.clusters["us-east-1"].ca
  exec {
    api_version = "client.authentication.k8s.io/v1"
    command     = "aws"
    args        = ["eks", "get-token", "--region", "us-east-1", "--cluster-name", local.clusters["us-east-1"].name]
  }
}

provider "helm" {
  alias = "us"
  kubernetes = {
    host                   = local.clusters["us-east-1"].endpoint
    cluster_ca_certificate = local.clusters["us-east-1"].ca
    exec = {
      api_version = "client.authentication.k8s.io/v1"
      command     = "aws"
      args        = ["eks", "get-token", "--region", "us-east-1", "--cluster-name", local.clusters["us-east-1"].name]
    }
  }
}

module "us" {
  source      = "../../modules/region"
  providers   = { kubernetes = kubernetes.us, helm = helm.us }
  name        = "us-east-1"
  image       = var.image
  rules       = local.rules
  mesh        = module.mesh.regions["us-east-1"]
  certificate = module.mesh.certificates["us-east-1"]
  dns_name    = local.names["us-east-1"]
  peer_cidrs  = local.peers["us-east-1"]
  # The network is there, too, before pods look for their peers.
  depends_on = [module.cloud, module.network]
}

module "edge_us" {
  source              = "../../modules/edge"
  count               = contains(keys(var.edge_certificates), "us-east-1") ? 1 : 0
  providers           = { kubernetes = kubernetes.us }
  namespace           = module.us.namespace
  address             = module.us.address
  token               = var.edge_token
  service_annotations = local.edges["us-east-1"]
  service_port        = 443
}

provider "kubernetes" {
  alias                  = "eu"
  host                   = local.clusters["eu-west-2"].endpoint
  cluster_ca_certificate = local.clusters["eu-west-2"].ca
  exec {
    api_version = "client.authentication.k8s.io/v1"
    command     = "aws"
    args        = ["eks", "get-token", "--region", "eu-west-2", "--cluster-name", local.clusters["eu-west-2"].name]
  }
}

provider "helm" {
  alias = "eu"
  kubernetes = {
    host                   = local.clusters["eu-west-2"].endpoint
    cluster_ca_certificate = local.clusters["eu-west-2"].ca
    exec = {
      api_version = "client.authentication.k8s.io/v1"
      command     = "aws"
      args        = ["eks", "get-token", "--region", "eu-west-2", "--cluster-name", local.clusters["eu-west-2"].name]
    }
  }
}

module "eu" {
  source      = "../../modules/region"
  providers   = { kubernetes = kubernetes.eu, helm = helm.eu }
  name        = "eu-west-2"
  image       = var.image
  rules       = local.rules
  mesh        = module.mesh.regions["eu-west-2"]
  certificate = module.mesh.certificates["eu-west-2"]
  dns_name    = local.names["eu-west-2"]
  peer_cidrs  = local.peers["eu-west-2"]
  # The network is there, too, before pods look for their peers.
  depends_on = [module.cloud, module.network]
}

module "edge_eu" {
  source              = "../../modules/edge"
  count               = contains(keys(var.edge_certificates), "eu-west-2") ? 1 : 0
  providers           = { kubernetes = kubernetes.eu }
  namespace           = module.eu.namespace
  address             = module.eu.address
  token               = var.edge_token
  service_annotations = local.edges["eu-west-2"]
  service_port        = 443
}

provider "kubernetes" {
  alias                  = "ap"
  host                   = local.clusters["ap-southeast-1"].endpoint
  cluster_ca_certificate = local.clusters["ap-southeast-1"].ca
  exec {
    api_version = "client.authentication.k8s.io/v1"
    command     = "aws"
    args        = ["eks", "get-token", "--region", "ap-southeast-1", "--cluster-name", local.clusters["ap-southeast-1"].name]
  }
}

provider "helm" {
  alias = "ap"
  kubernetes = {
    host                   = local.clusters["ap-southeast-1"].endpoint
    cluster_ca_certificate = local.clusters["ap-southeast-1"].ca
    exec = {
      api_version = "client.authentication.k8s.io/v1"
      command     = "aws"
      args        = ["eks", "get-token", "--region", "ap-southeast-1", "--cluster-name", local.clusters["ap-southeast-1"].name]
    }
  }
}

module "ap" {
  source      = "../../modules/region"
  providers   = { kubernetes = kubernetes.ap, helm = helm.ap }
  name        = "ap-southeast-1"
  image       = var.image
  rules       = local.rules
  mesh        = module.mesh.regions["ap-southeast-1"]
  certificate = module.mesh.certificates["ap-southeast-1"]
  dns_name    = local.names["ap-southeast-1"]
  peer_cidrs  = local.peers["ap-southeast-1"]
  # The network is there, too, before pods look for their peers.
  depends_on = [module.cloud, module.network]
}

module "edge_ap" {
  source              = "../../modules/edge"
  count               = contains(keys(var.edge_certificates), "ap-southeast-1") ? 1 : 0
  providers           = { kubernetes = kubernetes.ap }
  namespace           = module.ap.namespace
  address             = module.ap.address
  token               = var.edge_token
  service_annotations = local.edges["ap-southeast-1"]
  service_port        = 443
}
