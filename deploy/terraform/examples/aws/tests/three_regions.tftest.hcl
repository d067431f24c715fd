mock_provider "aws" {
  mock_resource "aws_eks_cluster" {
    defaults = {
      certificate_authority = [{ data = "YXV0aG9yaXR5" }]
    }
  }
  mock_resource "aws_iam_role" {
    defaults = {
      arn = "arn:aws:iam::123456789012:role/mocked"
    }
  }
}
mock_provider "helm" {
  alias = "us"
}
mock_provider "helm" {
  alias = "eu"
}
mock_provider "helm" {
  alias = "ap"
}
mock_provider "kubernetes" {
  alias = "us"
}
mock_provider "kubernetes" {
  alias = "eu"
}
mock_provider "kubernetes" {
  alias = "ap"
}

variables {
  image             = { repository = "registry.example.com/ratelimit-sidecar" }
  administrators    = ["192.0.2.0/24"]
  edge_token        = "0123456789abcdef0123456789abcdef"
  edge_certificates = { eu-west-2 = "arn:aws:acm:eu-west-2:123456789012:certificate/1" }
}

run "each_region_finds_the_others_by_name" {
  assert {
    condition = module.mesh.regions["us-east-1"].peers == [
      "ap-southeast-1.mesh.example.internal:50051", "eu-west-2.mesh.example.internal:50051",
    ]
    error_message = "By names of the private zone."
  }
  assert {
    condition     = [length(module.edge_us), length(module.edge_eu), length(module.edge_ap)] == [0, 1, 0]
    error_message = "An edge where there is a certificate for it."
  }
}
