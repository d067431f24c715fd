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

variables {
  name           = "ratelimit-eu-west-2"
  region         = "eu-west-2"
  cidr           = "10.2.0.0/16"
  peer_cidrs     = ["10.1.0.0/16", "10.3.0.0/16"]
  administrators = ["192.0.2.0/24"]
}

run "nodes_are_in_private_subnets_of_two_zones" {
  assert {
    condition = { for zone, subnet in aws_subnet.private : zone => subnet.cidr_block } == {
      eu-west-2a = "10.2.0.0/20"
      eu-west-2b = "10.2.16.0/20"
    }
    error_message = "The first of the sixteen parts."
  }
  assert {
    condition     = toset(aws_eks_node_group.this.subnet_ids) == toset(values(aws_subnet.private)[*].id)
    error_message = "Nodes are in them, and nowhere else."
  }
  assert {
    condition     = alltrue([for subnet in aws_subnet.public : subnet.map_public_ip_on_launch != true])
    error_message = "Nothing gets a public address by itself."
  }
  assert {
    condition     = aws_eks_node_group.this.ami_type == "AL2023_ARM_64_STANDARD"
    error_message = "As the instance type asks."
  }
}

run "only_other_regions_reach_the_mesh_and_only_administrators_the_api" {
  assert {
    condition = toset([for rule in aws_vpc_security_group_ingress_rule.mesh : "${rule.cidr_ipv4} ${rule.from_port}-${rule.to_port}"]) == toset([
      "10.1.0.0/16 50051-50051", "10.3.0.0/16 50051-50051",
    ])
    error_message = "The mesh port, from the other VPCs."
  }
  assert {
    condition     = aws_eks_cluster.this.vpc_config[0].public_access_cidrs == toset(["192.0.2.0/24"])
    error_message = "The cluster's API is not open to all."
  }
  assert {
    condition     = output.cluster.ca == "authority"
    error_message = "Providers take PEM."
  }
}

run "a_small_network_is_refused" {
  command = plan
  variables {
    cidr = "10.2.0.0/24"
  }
  expect_failures = [var.cidr]
}
