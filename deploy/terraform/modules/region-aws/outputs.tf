output "cluster" {
  description = "What the providers of Kubernetes and Helm need."
  value = {
    name     = aws_eks_cluster.this.name
    endpoint = aws_eks_cluster.this.endpoint
    ca       = base64decode(aws_eks_cluster.this.certificate_authority[0].data)
  }
}

output "vpc" {
  description = "What the module mesh-aws needs."
  value = {
    id          = aws_vpc.this.id
    region      = var.region
    cidr        = var.cidr
    route_table = aws_route_table.private.id
    # With what gives pods of external-dns their role.
    cluster = aws_eks_addon.identity.cluster_name
  }
}
