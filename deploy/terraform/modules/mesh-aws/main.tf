# Ways between the VPCs of all regions, two by two, and a DNS zone that all of them see and each writes its pods' addresses
# to.

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
    cluster     = string
  }))
}

locals {
  names = sort(keys(var.vpcs))
  pairs = {
    for pair in setproduct(local.names, local.names) : join("-to-", pair) => { from = pair[0], to = pair[1] }
    if index(local.names, pair[0]) < index(local.names, pair[1])
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

resource "aws_iam_role" "dns" {
  name = "ratelimit-dns-${replace(var.domain, ".", "-")}"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "pods.eks.amazonaws.com" }
      Action    = ["sts:AssumeRole", "sts:TagSession"]
    }]
  })
}

resource "aws_iam_role_policy" "dns" {
  name = "records"
  role = aws_iam_role.dns.name
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      { Effect = "Allow", Action = "route53:ChangeResourceRecordSets", Resource = aws_route53_zone.this.arn },
      {
        Effect   = "Allow"
        Action   = ["route53:ListHostedZones", "route53:ListResourceRecordSets", "route53:ListTagsForResources"]
        Resource = "*"
      },
    ]
  })
}

resource "aws_eks_addon" "dns" {
  for_each     = var.vpcs
  region       = each.value.region
  cluster_name = each.value.cluster
  addon_name   = "external-dns"
  configuration_values = jsonencode({
    domainFilters = [var.domain]
    policy        = "sync"
    txtOwnerId    = each.value.cluster
  })
  pod_identity_association {
    role_arn        = aws_iam_role.dns.arn
    service_account = "external-dns"
  }
  depends_on = [aws_iam_role_policy.dns]
}
