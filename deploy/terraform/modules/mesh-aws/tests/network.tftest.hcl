mock_provider "aws" {
  mock_resource "aws_iam_role" {
    defaults = {
      arn = "arn:aws:iam::123456789012:role/mocked"
    }
  }
}

variables {
  domain = "mesh.example.internal"
  vpcs = {
    us = { id = "vpc-1", region = "us-east-1", cidr = "10.1.0.0/16", route_table = "rtb-1", cluster = "us" }
    eu = { id = "vpc-2", region = "eu-west-2", cidr = "10.2.0.0/16", route_table = "rtb-2", cluster = "eu" }
    ap = { id = "vpc-3", region = "ap-southeast-1", cidr = "10.3.0.0/16", route_table = "rtb-3", cluster = "ap" }
  }
}

run "every_two_regions_are_peered_once_with_a_route_each_way" {
  assert {
    condition     = sort(keys(aws_vpc_peering_connection.this)) == tolist(["ap-to-eu", "ap-to-us", "eu-to-us"])
    error_message = "Three pairs."
  }
  assert {
    condition     = aws_vpc_peering_connection_accepter.this["eu-to-us"].region == "us-east-1"
    error_message = "It is accepted where it ends."
  }
  assert {
    condition = toset([for route in aws_route.this : "${route.route_table_id} ${route.destination_cidr_block}"]) == toset([
      "rtb-1 10.2.0.0/16", "rtb-1 10.3.0.0/16",
      "rtb-2 10.1.0.0/16", "rtb-2 10.3.0.0/16",
      "rtb-3 10.1.0.0/16", "rtb-3 10.2.0.0/16",
    ])
    error_message = "Each region has a route to each other."
  }
  assert {
    condition     = length(aws_route53_zone.this.vpc) == 3
    error_message = "All regions see the zone."
  }
  assert {
    condition     = { for region, addon in aws_eks_addon.dns : region => addon.cluster_name } == { us = "us", eu = "eu", ap = "ap" }
    error_message = "And write to it."
  }
}
