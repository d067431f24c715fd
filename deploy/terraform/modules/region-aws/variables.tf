variable "name" {
  description = "Of the cluster, and of what belongs to it."
  type        = string
}

variable "region" {
  description = "AWS's name of it."
  type        = string
}

variable "zones" {
  description = "Letters of at least two availability zones."
  type        = list(string)
  default     = ["a", "b"]
  validation {
    condition     = length(var.zones) >= 2
    error_message = "A cluster needs subnets in two zones."
  }
}

variable "cidr" {
  description = "Of the VPC, a /16; those of regions that are in one mesh must not overlap."
  type        = string
  validation {
    condition     = endswith(var.cidr, "/16")
    error_message = "It is cut into subnets of a /20 each, so it has to be a /16."
  }
}

variable "kubernetes_version" {
  type    = string
  default = "1.35"
}

variable "administrators" {
  description = "Address ranges from which the cluster's API is reached."
  type        = list(string)
}

variable "nodes" {
  type = object({
    instance_type = optional(string, "c7g.large")
    min           = optional(number, 2)
    max           = optional(number, 6)
  })
  default = {}
}

variable "peer_cidrs" {
  description = "Of the other regions' VPCs."
  type        = list(string)
  default     = []
}
