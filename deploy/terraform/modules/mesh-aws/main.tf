# Ways between the VPCs of all regions, two by two, and a DNS zone that all of them see.

terraform {
  required_version = ">= 1.7"
  required_providers {
    aws = { source = "hashicorp/aws", version = "~> 6.0" }
  }
}

variable "domain" {
  description = "Of the zone."
  type        = string
}

variable "vpcs" {
  description = "The region module's vpc, by region."
  type = map(object({
    id          = string
    region      = string
    cidr        = string
    route_table = string
  }))
}

locals {
  names = sort(keys(var.vpcs))
  pairs = {
    for pair in setproduct(local.names, local.names) : join("-to-", pair) => { from = pair[0], to = pair[1] }
    if pair[0] < pair[1]
  }
  # Each way needs a route at both of its ends.
  routes = merge([
    for name, pair in local.pairs : {
      "${name}-there" = { at = pair.from, to = pair.to, way = name }
      "${name}-back"  = { at = pair.to, to = pair.from, way = name }
    }
  ]...)
}

resource "aws_vpc_peering_connection" "this" {
  for_each    = local.pairs
  region      = var.vpcs[each.value.from].region
  vpc_id      = var.vpcs[each.value.from].id
  peer_vpc_id = var.vpcs[each.value.to].id
  peer_region = var.vpcs[each.value.to].region
  tags        = { Name = each.key }
}

resource "aws_vpc_peering_connection_accepter" "this" {
  for_each                  = local.pairs
  region                    = var.vpcs[each.value.to].region
  vpc_peering_connection_id = aws_vpc_peering_connection.this[each.key].id
  auto_accept               = true
  tags                      = { Name = each.key }
}

resource "aws_route" "this" {
  for_each                  = local.routes
  region                    = var.vpcs[each.value.at].region
  route_table_id            = var.vpcs[each.value.at].route_table
  destination_cidr_block    = var.vpcs[each.value.to].cidr
  vpc_peering_connection_id = aws_vpc_peering_connection_accepter.this[each.value.way].id
}

resource "aws_route53_zone" "this" {
  name = var.domain
  dynamic "vpc" {
    for_each = var.vpcs
    content {
      vpc_id     = vpc.value.id
      vpc_region = vpc.value.region
    }
  }
}

output "zone" {
  value = { name = var.domain, arn = aws_route53_zone.this.arn }
}
