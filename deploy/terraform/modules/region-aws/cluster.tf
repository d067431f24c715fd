resource "aws_iam_role" "cluster" {
  name               = "${var.name}-cluster"
  assume_role_policy = local.trusts["eks"]
}

resource "aws_iam_role_policy_attachment" "cluster" {
  role       = aws_iam_role.cluster.name
  policy_arn = "${local.policies}/AmazonEKSClusterPolicy"
}

resource "aws_iam_role" "nodes" {
  name               = "${var.name}-nodes"
  assume_role_policy = local.trusts["ec2"]
}

resource "aws_iam_role_policy_attachment" "nodes" {
  for_each   = toset(["AmazonEKSWorkerNodePolicy", "AmazonEKS_CNI_Policy", "AmazonEC2ContainerRegistryPullOnly"])
  role       = aws_iam_role.nodes.name
  policy_arn = "${local.policies}/${each.key}"
}

resource "aws_eks_cluster" "this" {
  region   = var.region
  name     = var.name
  version  = var.kubernetes_version
  role_arn = aws_iam_role.cluster.arn
  access_config {
    authentication_mode                         = "API"
    bootstrap_cluster_creator_admin_permissions = true
  }
  vpc_config {
    subnet_ids              = values(aws_subnet.private)[*].id
    endpoint_private_access = true
    public_access_cidrs     = var.administrators
  }
  depends_on = [aws_iam_role_policy_attachment.cluster, aws_route.private]
}

resource "aws_eks_node_group" "this" {
  region          = var.region
  cluster_name    = aws_eks_cluster.this.name
  node_group_name = "sidecars"
  node_role_arn   = aws_iam_role.nodes.arn
  subnet_ids      = values(aws_subnet.private)[*].id
  instance_types  = [var.nodes.instance_type]
  ami_type        = can(regex("^[a-z]+[0-9]+g", var.nodes.instance_type)) ? "AL2023_ARM_64_STANDARD" : "AL2023_x86_64_STANDARD"
  scaling_config {
    desired_size = var.nodes.min
    min_size     = var.nodes.min
    max_size     = var.nodes.max
  }
  lifecycle {
    # The autoscaler's.
    ignore_changes = [scaling_config[0].desired_size]
  }
  depends_on = [aws_iam_role_policy_attachment.nodes]
}

# So that the NetworkPolicy of the chart is enforced.
resource "aws_eks_addon" "network" {
  region               = var.region
  cluster_name         = aws_eks_cluster.this.name
  addon_name           = "vpc-cni"
  configuration_values = jsonencode({ enableNetworkPolicy = "true" })
}

resource "aws_eks_addon" "identity" {
  region       = var.region
  cluster_name = aws_eks_cluster.this.name
  addon_name   = "eks-pod-identity-agent"
  depends_on   = [aws_eks_node_group.this]
}

# The addresses of pods come to other regions' pods. Outside the cluster's own group only the mesh port is open.
resource "aws_vpc_security_group_ingress_rule" "mesh" {
  for_each          = toset(var.peer_cidrs)
  region            = var.region
  security_group_id = aws_eks_cluster.this.vpc_config[0].cluster_security_group_id
  description       = "Sidecars of other regions"
  cidr_ipv4         = each.key
  ip_protocol       = "tcp"
  from_port         = 50051
  to_port           = 50051
}
