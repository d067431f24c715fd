output "cluster" {
  description = "What the providers of Kubernetes and Helm need."
  value = {
    name     = aws_eks_cluster.this.name
    endpoint = aws_eks_cluster.this.endpoint
    ca       = base64decode(aws_eks_cluster.this.certificate_authority[0].data)
  }
}

output "vpc" {
  value = {
    id          = aws_vpc.this.id
    region      = var.region
    cidr        = var.cidr
    route_table = aws_route_table.private.id
  }
}
